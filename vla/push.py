"""`vla push`: a policy directory to the Hugging Face Hub.

    vla push runs/merged --repo me/my-policy --private
    vla push runs/merged --repo me/my-policy --dry-run

The whole directory goes up, so that `vla serve --policy me/my-policy` acts as it does here: weights, statistics,
preprocessing, action tokens, model card. Large files go in parts; pushed again after an interruption, what is there already
is not sent again. Weights of an earlier push that this one no longer has are deleted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from vla.backbone import TINY
from vla.card_facts import CARD_FILE, read_facts
from vla.hub_policy import HTTP_ERROR
from vla.spec import FILE, TOKENIZER_FOLDER, read_spec
from vla.types import VlaError, problem

FILES = (FILE, "README.md", CARD_FILE, "dataset_statistics.json")
FOLDERS = ("adapter", "model", "head", "processor", "tokenizer", TOKENIZER_FOLDER)
ENDINGS = (".json", ".jsonl", ".safetensors", ".txt", ".model", ".jinja", ".md", ".npz", ".npy")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Settings:
    """Settings of `vla push`."""

    policy: tyro.conf.Positional[Path]
    """Policy directory."""
    repo: str
    """OWNER/NAME on the Hub; made if it is not there."""
    private: bool = False
    """Only you can see a repository that is made now. One that exists stays what it is."""
    message: str = "Upload policy"
    """Of the commit."""
    dry_run: bool = False
    """List what would go up; ask nobody."""


def run(settings: Settings) -> str:
    """Upload; returns the address of the commit, or of the repository it would go to."""
    if not _REPO.fullmatch(settings.repo):
        raise problem(f"--repo {settings.repo!r}", "OWNER/NAME", "correct it")
    files = files_of(settings.policy)
    size_mb = sum((settings.policy / name).stat().st_size for name in files) / 1e6
    address = f"{constants.ENDPOINT}/{settings.repo}"
    if not read_facts(settings.policy).get("license"):
        print(f"note: the model card names no licence; `vla card {settings.policy} --license apache-2.0` adds one")
    if settings.dry_run:
        print("\n".join(f"{(settings.policy / name).stat().st_size / 1e6:10.3f} MB  {name}" for name in files))
        print(f"would upload {len(files)} files, {size_mb:.1f} MB, to {address}")
        return address
    api = HfApi()
    try:
        api.create_repo(settings.repo, private=settings.private or None, exist_ok=True)
        info = api.upload_folder(
            repo_id=settings.repo, folder_path=settings.policy, commit_message=settings.message,
            allow_patterns=files, delete_patterns=[f"{folder}/*" for folder in FOLDERS],
        )  # fmt: skip
    except (HTTP_ERROR, OSError, ValueError) as error:
        raise _explained(error, settings.repo) from error
    print(f"uploaded {len(files)} files, {size_mb:.1f} MB, to {address}\ntry it: vla serve --policy {settings.repo}")
    return str(info.commit_url)


def files_of(policy: Path) -> list[str]:
    """The files of a policy directory that go up, as paths inside it.

    Raises:
        VlaError: no policy directory, a file of a kind that is never read, or an adapter of a base that only this machine has.
    """
    spec = read_spec(policy)
    source = spec.backbone.source
    if spec.backbone.weights != "merged" and source != TINY and (Path(source).exists() or not _REPO.fullmatch(source)):
        raise problem(f"{spec.backbone.weights} weights on {source}, which only this machine has", "a base on the Hub, or merged "
                      "weights", f"vla merge --policy {policy} --out MERGED, then push MERGED")  # fmt: skip
    found = [policy / name for name in FILES if (policy / name).is_file()]
    for folder in FOLDERS:
        found += sorted(path for path in (policy / folder).rglob("*") if path.is_file())
    strange = [path for path in found if not path.name.endswith(ENDINGS)]
    if strange:
        raise problem(f"{strange[0]}", f"files of a policy directory ({', '.join(ENDINGS)})", "move it elsewhere; code and "
                      "pickles are never loaded from a policy")  # fmt: skip
    return [path.relative_to(policy).as_posix() for path in found]


def _explained(error: Exception, repo: str) -> VlaError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in (401, 403):
        return problem(f"no right to write to {repo}: {reason}", "a token with write access to that owner",
                       "run `hf auth login`, or set HF_TOKEN")  # fmt: skip
    if status == 404:
        return problem(f"{repo}: {reason}", "an owner that exists and that you may write to", "correct --repo")
    if status and status < 500:
        return problem(f"{repo}: {reason}", "an upload that the Hub accepts", "mend what it says, and push again")
    if isinstance(error, ValueError):
        return problem(f"{repo}: {reason}", "files that the Hub accepts", "mend what it says, and push again")
    return problem(f"{repo}: {type(error).__name__}: {reason}", f"a connection to {constants.ENDPOINT}",
                   "connect (HF_HUB_OFFLINE unset) and push again: what is there already is not sent again")  # fmt: skip
