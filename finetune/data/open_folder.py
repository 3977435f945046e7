"""A dataset on this machine, by what its folder holds. Readers are imported when they are needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vla.finetune.data.standard import Standardizer
from vla.finetune.formats.source import FrameSource
from vla.finetune.formats.unfinished import check_finished
from vla.types import VlaError, problem

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_HDF5 = (".hdf5", ".h5")
_LOOKED_FOR = ("cache.json (our cache), meta/info.json (LeRobot), features.json or dataset_info.json here or in a folder "
               "named as a version (RLDS), *.hdf5 or *.h5 (LIBERO)")  # fmt: skip


def open_folder(
    path: Path, split: str | None = None, *, name: str | None = None, skip_bad: bool = False
) -> FrameSource:
    """The dataset in this folder or file; `split` is for RLDS. See `vla.finetune.data.open_source.open_source`.

    With `skip_bad` the readers leave out what they cannot read; images are for `without_bad` to look at. VlaError naming
    the command that continues, for a folder that a conversion has begun and not finished.
    """
    check_finished(path)
    rlds = _rlds_folder(path)
    if rlds is not None:
        return _rlds(rlds, split, name, skip_bad)
    if split is not None:
        raise problem(f"#split={split} of {path}", "an RLDS dataset, the only ones with splits", "drop #split=...")
    if (path / "cache.json").is_file() or (path / "writing.json").is_file():  # the reader says how to finish that one
        from vla.finetune.formats.cache_reader import CacheReader

        return CacheReader(path, name, skip_bad)
    if (path / "meta" / "info.json").is_file():
        from vla.finetune.formats.lerobot_reader import LeRobotReader

        return LeRobotReader(path, name, skip_bad=skip_bad)
    if path.suffix in _HDF5 or (path.is_dir() and any(file.suffix in _HDF5 for file in path.iterdir())):
        from vla.finetune.formats.hdf5_reader import Hdf5Reader

        return Hdf5Reader(path, name, skip_bad)
    inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing" if path.is_dir() else "a file"
    raise problem(f"{path}, in which there is {inside}", _LOOKED_FOR, "name the folder of one dataset")


def _rlds_folder(path: Path) -> Path | None:
    """The folder with the shards: this one, or the only version in it; None if there is none."""
    if not path.is_dir():
        return None
    versions = [path, *sorted(p for p in path.iterdir() if _VERSION.fullmatch(p.name) and p.is_dir())]
    found = [p for p in versions if (p / "features.json").is_file() or (p / "dataset_info.json").is_file()]
    if len(found) > 1 and found[0] != path:
        raise problem(f"{len(found)} versions in {path}: {', '.join(p.name for p in found)}", "one",
                      f"name one, e.g. {found[-1]}")  # fmt: skip
    return found[0] if found else None


def _rlds(folder: Path, split: str | None, name: str | None, skip_bad: bool) -> FrameSource:
    from vla.finetune.formats.rlds_reader import RldsReader

    full = Path(os.path.abspath(folder))  # a link keeps its own name
    own = full.parent.name if _VERSION.fullmatch(full.name) else full.name
    return RldsReader(folder, split or "train", _standardizer(own), name or own, skip_bad)


def _standardizer(name: str) -> Standardizer | None:
    """OpenVLA's rule for a dataset of this name, with all cameras; None if it knows none."""
    from vla.finetune.oxe.configs import DATASETS
    from vla.finetune.oxe.registry import dataset_name, oxe_standardizer

    try:
        full = dataset_name(name)
    except VlaError:
        return None
    return oxe_standardizer(full, tuple(DATASETS[full].cameras))
