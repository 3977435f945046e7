"""Any dataset by its folder, file or address.

    vla finetune --data data/demos                                  LeRobot v2.1 or v3.0 (meta/info.json)
    vla finetune --data 'oxe/bridge_orig/1.0.0#split=train[:95%]'   RLDS / TFDS (features.json, dataset_info.json)
    vla finetune --data LIBERO/libero_goal                          HDF5: a file, or a folder of them
    vla finetune --data cache/demos                                 our own cache (cache.json)
    vla finetune --data lerobot/libero_10_image                     the Hub: OWNER/NAME, or hf://datasets/OWNER/NAME

Only RLDS datasets have splits; without `#split=` it is all of `train`. An RLDS dataset with an Open X-Embodiment name
(the folder's, or that of the folder above a version) is standardised as OpenVLA does, with all of its cameras.

    vla finetune --data 'lerobot/libero_10_image#cache_gb=20'       the same, of which no more than 20 GB are kept on the disk

    vla finetune --data oxe:bridge_rt_1@oxe                         a named mixture of OpenVLA, each dataset in oxe/
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vla.finetune.data.open_folder import open_folder
from vla.finetune.data.without_bad import without_bad
from vla.finetune.formats.source import FrameSource
from vla.types import VlaError, problem

_OPTION = re.compile(r"(?P<address>.+)#(?P<option>split|cache_gb)=(?P<value>.*)")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^/]+)?")


def open_source(
    text: str | Path, *, name: str | None = None, skip_bad: bool = False, revisions: Mapping[str, str] | None = None
) -> FrameSource:
    """The dataset that `text` names, whatever its format.

    Args:
        name: its `unnorm_key`; None: the folder's or file's name.
        skip_bad: leave out, count and list (`FrameSource.bad`) the episodes that cannot be used: see `without_bad`.
        revisions: name of a dataset -> the commit to open, where it is on the Hub and its address names none.

    Raises:
        VlaError: nothing there, or no format that is known (what was looked for is listed), or the reader's own.
    """
    address, option, value = _option_of(str(text))
    path, split = Path(address), value if option else None
    if option == "cache_gb":
        return _streamed(_pinned(address, name, revisions), name, value, skip_bad)
    if address.startswith("hf://") or (not path.exists() and _HUB.fullmatch(address)):
        found = _from_hub(_pinned(address, name, revisions), name, split, skip_bad)
        return without_bad(found) if skip_bad else found
    if not path.exists():
        raise problem(f"no {path}", "a dataset's folder or file, OWNER/NAME or hf://datasets/OWNER/NAME of the Hub",
                      "correct the path")  # fmt: skip
    found = open_folder(path, split, name=name, skip_bad=skip_bad)
    return without_bad(found) if skip_bad else found


def open_sources(
    texts: Sequence[str | Path],
    weights: Sequence[float] = (),
    skip_bad: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> tuple[list[FrameSource], list[float] | None]:
    """Several datasets, and how much a frame of each weighs; None if every frame weighs the same.

    Args:
        texts: each as in `open_source`, or "oxe:MIXTURE@FOLDER": the datasets of a mixture of OpenVLA, with its weights.
        weights: one per text; a mixture's own are multiplied by its.
        revisions: as in `open_source`.

    Raises:
        VlaError: another number of weights, an unknown mixture, one of its datasets is not in FOLDER, two datasets of
            one name, or as `open_source`.
    """
    if weights and len(weights) != len(texts):
        raise problem(f"{len(weights)} weights for {len(texts)} datasets", "one per dataset", "correct --weights")
    sources, found = [], []
    for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True):
        rows = _mixture(str(text)) if str(text).startswith("oxe:") else [(text, 1.0)]
        sources += [open_source(address, skip_bad=skip_bad, revisions=revisions) for address, _ in rows]
        found += [weight * own for _, own in rows]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise problem(
                f"two datasets called {name!r}", "different names, as statistics go by them", "rename a folder"
            )
    return sources, found if weights or set(found) != {1.0} else None


def _mixture(text: str) -> list[tuple[str, float]]:
    """(address, weight) of each dataset of "oxe:MIXTURE@FOLDER"."""
    from vla.finetune.oxe.registry import mixture

    name, at, folder = text.removeprefix("oxe:").partition("@")
    rows = mixture(name)
    if not at:
        raise problem(f"{text!r} without a folder", "oxe:MIXTURE@FOLDER", "name the folder that holds its datasets")
    missing = [dataset for dataset, _ in rows if not (Path(folder) / dataset).exists()]
    if missing:
        raise problem(f"no {', '.join(missing)} in {folder}", f"the {len(rows)} datasets of {name}",
                      "download them there, or name datasets one by one with --weights")  # fmt: skip
    return [(str(Path(folder) / dataset), weight) for dataset, weight in rows]


def _option_of(text: str) -> tuple[str, str, str]:
    """(address, "split" or "cache_gb" or "", its value); a # that begins neither belongs to the path."""
    if Path(text).exists():
        return text, "", ""
    found = _OPTION.fullmatch(text)
    if found:
        return found["address"], found["option"], found["value"]
    before, mark, _ = text.rpartition("#")
    if mark and (Path(before).exists() or _HUB.fullmatch(before) or before.startswith("hf://")):
        raise problem(f"{text!r}", "PATH#split=SPLIT, e.g. #split=train[:95%], or OWNER/NAME#cache_gb=GB",
                      "correct what follows the #")  # fmt: skip
    return text, "", ""


def _pinned(address: str, name: str | None, revisions: Mapping[str, str] | None) -> str:
    """The address with the commit that is asked for, unless it names one."""
    from vla.finetune.formats.hub import HubAddress, parse_address

    if not revisions or Path(address).exists():
        return address
    found = parse_address(address)
    commit = revisions.get(name or found.name)
    return str(replace(found, revision=commit)) if commit and found.revision == HubAddress.revision else address


def _streamed(address: str, name: str | None, cache_gb: str, skip_bad: bool) -> FrameSource:
    from vla.finetune.formats.hub import list_files, parse_address
    from vla.finetune.formats.hub_source import HubSource

    if Path(address).exists():
        raise problem(f"#cache_gb={cache_gb} of {address}", "a dataset on the Hub", "drop #cache_gb=..., as it is here")
    try:
        limit_gb = float(cache_gb)
    except ValueError as error:
        raise problem(f"cache_gb {cache_gb!r}", "a number of GB", "e.g. #cache_gb=20") from error
    found = parse_address(address)
    return HubSource(found, list_files(found), name or found.name, limit_gb, skip_bad)


def _from_hub(address: str, name: str | None, split: str | None, skip_bad: bool) -> FrameSource:
    from vla.finetune.formats.hub import open_hub

    if split is not None:
        raise problem(f"#split={split} of {address}", "a LeRobot dataset whole, as the Hub has them", "drop #split=...")
    try:
        return open_hub(address, name, skip_bad)
    except VlaError as error:
        if address.startswith("hf://"):
            raise
        raise VlaError(f"there is no folder {address} here, and on the Hub: {error}") from error
