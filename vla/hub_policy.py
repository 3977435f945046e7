"""Policies and backbones on the Hugging Face Hub, through `huggingface_hub` and its cache (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE apply).

    OWNER/NAME                     the main branch, where there is no folder OWNER here
    hf://OWNER/NAME@REVISION       a branch, tag or commit

Of a repository only what a policy directory holds is fetched: JSON, safetensors, a tokenizer's text files. Never code, never
pickles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vla.types import VlaError, problem

PREFIX = "hf://"
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "README.md")
"""`.txt`: merges.txt; `.model`: sentencepiece, which is no pickle."""
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])  # of the HTTP library that this version of it uses
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?")


def policy_folder(policy: str | Path) -> Path:
    """The policy directory itself, or that of a Hub repository, fetched into the local cache if need be.

    Raises:
        VlaError: the repository is not there, may not be read, or the Hub cannot be reached.
    """
    text = str(policy)
    address = text.removeprefix("hf:").lstrip("/") if text.startswith("hf:") else text  # a pathlib.Path loses a slash
    found = _ADDRESS.fullmatch(address)
    if text.startswith("hf:") and found is None:
        raise problem(f"address {text!r}", f"{PREFIX}OWNER/NAME[@REVISION]", "correct it")
    if not names_repository(policy):
        return Path(policy)
    assert found is not None
    return fetch(found["repo"], found["revision"], "a policy directory")


def names_repository(policy: str | Path) -> bool:
    """Whether this names a repository on the Hub: by its prefix, or as OWNER/NAME where there is no folder OWNER here."""
    text = str(policy)
    if text.startswith("hf:"):
        return True
    return _ADDRESS.fullmatch(text) is not None and not text.startswith(".") and not _is_here(Path(text))


def backbone_folder(source: str, revision: str | None) -> Path:
    """The folder of a backbone's checkpoint: itself, or a Hub repository's in the local cache, fetched if need be."""
    return Path(source) if Path(source).is_dir() else fetch(source, revision, "a checkpoint folder")


def fetch(repo: str, revision: str | None, wanted: str) -> Path:
    """A repository's snapshot: what of it `WANTED` names."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(WANTED)))
    except (HTTP_ERROR, OSError, ValueError) as error:
        raise explained(error, f"{repo}@{revision or 'main'}", wanted) from error


def explained(error: Exception, what: str, wanted: str) -> VlaError:
    """An error of `huggingface_hub` in the house form."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, RevisionNotFoundError):
        return problem(f"no revision {what.rpartition('@')[2]!r} of {what}", "a branch, tag or commit of it", "correct what follows @")  # fmt: skip
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return problem(f"{what}, which is no folder here, and no access to it on the Hub: {reason}",
                       f"{wanted}, or a repository that exists and that you may read",
                       "correct the name; for a private or gated repository accept its terms and run `hf auth login`")  # fmt: skip
    if isinstance(error, HfHubHTTPError):
        return problem(f"{what}: {reason}", "an answer of the Hub", "the Hub has a fault: try again later")
    if isinstance(error, OSError) and error.errno is not None:
        return problem(f"{what}: {reason}", "room for its files", f"see to {constants.HF_HUB_CACHE} and start again")
    if isinstance(error, ValueError) and not isinstance(error, LocalEntryNotFoundError):
        return problem(f"{what}: {reason}", f"{wanted}, or OWNER/NAME", "correct the name")
    return problem(f"{what}, which is no folder here and not in the cache, and the Hub cannot be reached ({type(error).__name__}: {reason})",
                   f"{wanted}, or a connection to {constants.ENDPOINT}",
                   "check the path; or connect (HF_HUB_OFFLINE unset) and start again")  # fmt: skip


def _is_here(path: Path) -> bool:
    """A path, even if its last part is misspelt: its first folder exists."""
    return path.exists() or Path(path.parts[0]).exists()
