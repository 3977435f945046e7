"""`features.json` of tensorflow_datasets: the features of an RLDS episode, and how each lies in a `tf.train.Example`.

What TFDS writes (core/example_serializer.py, core/features/): nested features under names joined by "/"; a feature of
the steps with the values of all steps one after the other; a sequence within the steps as `<name>/ragged_flat_values`
and `<name>/ragged_row_lengths_0`; bool and integers as int64 (uint64 by its bits), every float as float32; images
and tensors with an encoding as one string each.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.finetune.formats.tf_example import Feature
from vla.finetune.formats.tfds_info import FEATURES, read_json
from vla.types import VlaError, problem

STEPS = "steps"
FLAT, ROWS = "/ragged_flat_values", "/ragged_row_lengths_0"
TENSORS = ("Tensor", "Scalar", "ClassLabel", "BBoxFeature")
NUMBERS = {"float16", "bfloat16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
           "uint64"}  # fmt: skip
TEXT_DTYPES = ("string", "object", "str")


@dataclass(frozen=True)
class Leaf:
    """One feature that is not a container."""

    key: str
    """Name without "steps/", e.g. "observation/image" or "episode_metadata/file_path"."""
    kind: str
    """"number", "text", "image", or "unsupported"."""
    dtype: str
    """numpy's name of it; "str" for text; for "unsupported", what it is."""
    shape: tuple[int | None, ...] = ()
    """Of one value, without the steps and without `ragged`."""
    encoding: str = "none"
    """Of a tensor: "none", "bytes" or "zlib"."""
    in_steps: bool = True
    """False: once per episode."""
    ragged: bool = False
    """A sequence whose length differs between steps (or, outside the steps, between episodes)."""

    @property
    def stored(self) -> str:
        """Its name in the record, less what is added for ragged ones."""
        return f"{STEPS}/{self.key}" if self.in_steps else self.key

    @property
    def names(self) -> tuple[str, ...]:
        """Its names in the record."""
        if self.ragged and self.in_steps:
            return self.stored + FLAT, self.stored + ROWS
        return (self.stored,)

    @property
    def size(self) -> int:
        """Stored values per value: 1 for an image or an encoded tensor, which are one string."""
        return 1 if self.kind == "image" or self.encoding != "none" else math.prod(n or 0 for n in self.shape)


def read_features(root: Path) -> dict[str, Leaf]:
    """The leaves of `features.json` by key, in its order. VlaError if it is missing, odd, or without steps."""
    path = root / FEATURES
    content = read_json(path)
    try:
        found: list[Leaf] = []
        _walk(content, "", 0, False, found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise problem(f"{path} that cannot be understood ({error!r})", "a file written by tensorflow_datasets",
                      "copy it again") from error  # fmt: skip
    if not any(leaf.in_steps for leaf in found):
        names = ", ".join(leaf.key for leaf in found) or "none"
        raise problem(f"{path} with the features {names}", f"an RLDS dataset: a sequence {STEPS!r}",
                      "choose a dataset of episodes")  # fmt: skip
    return {leaf.key: leaf for leaf in sorted(found, key=lambda leaf: not leaf.in_steps)}


def episode_length(leaves: dict[str, Leaf], example: dict[str, Feature], where: str) -> int:
    """T of a record: the number of values that most of its features of the steps have."""
    counts = Counter(len(example[leaf.stored].values) // leaf.size for leaf in leaves.values()
                     if leaf.in_steps and not leaf.ragged and leaf.kind != "unsupported" and leaf.stored in example)  # fmt: skip
    if not counts:
        raise problem(
            f"{where}: a record without any feature of the steps", f"those of {FEATURES}", "copy the dataset again"
        )
    return counts.most_common(1)[0][0]


def column(leaf: Leaf, example: dict[str, Feature], record: bytes, n_steps: int, where: str) -> np.ndarray:
    """(T, ...) values of a feature that is no image, in its declared dtype.

    Text is an object array of `str`, with `bytes` for values that are not UTF-8 (some datasets keep compressed numbers
    in text). A ragged feature is an object array of T arrays. What there is once per episode
    is repeated.

    Raises:
        VlaError: not in the record, or not T values of the declared shape (`where` and the key are named).
    """
    if leaf.kind in ("unsupported", "image"):
        what = leaf.dtype if leaf.kind == "unsupported" else "Image"
        raise problem(f"{where}: feature {leaf.key!r} of type {what}", "numbers or text", "leave the feature out")
    if leaf.ragged and leaf.in_steps:
        return _ragged(leaf, example, record, n_steps, where)
    stored = _values(leaf, _named(example, leaf.stored, where), record, where)
    n = n_steps if leaf.in_steps else 1
    if leaf.ragged:
        values = np.empty(1, object)
        values[0] = stored
    else:
        if len(stored) != n:
            raise problem(f"{where}: {leaf.key!r} with {len(stored)} values of shape {leaf.shape}",
                          f"{n}, one per {'step' if leaf.in_steps else 'episode'}",
                          "the record is damaged: copy the dataset again, or leave it out with --skip-bad")  # fmt: skip
        values = stored
    return values if leaf.in_steps else np.repeat(values, n_steps, axis=0)


def _named(example: dict[str, Feature], name: str, where: str) -> Feature:
    if name not in example:
        raise problem(f"{where}: no feature {name!r}", f"it, as {FEATURES} says", "copy the dataset again")
    return example[name]


def _values(leaf: Leaf, feature: Feature, record: bytes, where: str) -> np.ndarray:
    """(n, *shape) of the declared dtype."""
    shape = tuple(n or 0 for n in leaf.shape)
    want = "bytes" if leaf.kind == "text" or leaf.encoding != "none" else "float" if "float" in leaf.dtype else "int"
    if feature.kind not in (want, ""):
        raise problem(
            f"{where}: {leaf.key!r} stored as {feature.kind}", f"{want}, for {leaf.dtype}", f"mend {FEATURES}"
        )
    if len(feature.values) % leaf.size:
        raise problem(f"{where}: {leaf.key!r} with {len(feature.values)} values",
                      f"a multiple of {leaf.size}, its shape being {shape}",
                      "the record is damaged: copy the dataset again, or leave it out with --skip-bad")  # fmt: skip
    if want != "bytes":
        values = feature.values.reshape(-1, *shape)
        return values.view(np.uint64) if leaf.dtype == "uint64" else values.astype(_numpy(leaf.dtype), copy=False)
    strings = [record[start : start + length] for start, length in feature.values]
    if leaf.kind == "text":
        return _text(strings, shape)
    decoded = [_decoded(leaf, shape, data, where) for data in strings]
    return np.stack(decoded) if decoded else np.zeros((0, *shape), _numpy(leaf.dtype))


def _text(strings: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    values = np.empty(len(strings), object)
    values[:] = [_str_or_bytes(data) for data in strings]
    return values.reshape(-1, *shape)


def _str_or_bytes(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _decoded(leaf: Leaf, shape: tuple[int, ...], data: bytes, where: str) -> np.ndarray:
    try:
        raw = zlib.decompress(data) if leaf.encoding == "zlib" else data
        return np.frombuffer(raw, _numpy(leaf.dtype)).reshape(shape)
    except (zlib.error, ValueError) as error:
        raise problem(
            f"{where}: {leaf.key!r}: {error}", f"{leaf.encoding} of shape {shape}", "copy the dataset again"
        ) from error


def _ragged(leaf: Leaf, example: dict[str, Feature], record: bytes, n_steps: int, where: str) -> np.ndarray:
    flat = _values(leaf, _named(example, leaf.stored + FLAT, where), record, where)
    lengths = _named(example, leaf.stored + ROWS, where).values
    if len(lengths) != n_steps or lengths.sum() != len(flat) or (lengths < 0).any():
        raise problem(f"{where}: {leaf.key!r} with {len(lengths)} rows and {len(flat)} values",
                      f"{n_steps} rows that use them all", "the record is damaged: copy the dataset again")  # fmt: skip
    rows = np.empty(n_steps, object)
    for i, stop in enumerate(np.cumsum(lengths)):
        rows[i] = flat[stop - lengths[i] : stop]
    return rows


def _numpy(dtype: str) -> np.dtype:
    return np.dtype(np.float32 if dtype == "bfloat16" else dtype)  # numpy has no bfloat16; the record holds float32


def _walk(node: dict[str, Any], name: str, depth: int, in_steps: bool, found: list[Leaf]) -> None:
    """The leaves below a feature into `found`; `depth` is the number of sequences around it."""
    kind, content = _kind(node)
    if kind in ("FeaturesDict", "Translation"):
        for key, child in (content.get("features") or {} if "type" not in node else content).items():
            _walk(child, f"{name}/{key}" if name else key, depth, in_steps, found)
    elif kind in ("Sequence", "Dataset"):
        if name == STEPS and depth == 0:
            _walk(content["feature"], "", 1, True, found)
        else:
            _walk(content["feature"], name, depth + 1, in_steps, found)
    else:
        found.append(_leaf(kind, content, name, depth, in_steps))


def _leaf(kind: str, content: dict[str, Any], name: str, depth: int, in_steps: bool) -> Leaf:
    shape, around = _shape(content.get("shape")), depth - in_steps
    dtype, encoding = str(content.get("dtype") or ""), str(content.get("encoding") or "none").lower()
    dtype = (
        {"ClassLabel": "int64", "BBoxFeature": "float32"}.get(kind, dtype).removeprefix("tf.").removeprefix("numpy.")
    )
    shape = (4,) if kind == "BBoxFeature" else shape
    unsupported = Leaf(name, "unsupported", kind, in_steps=in_steps)
    if around > 1 or 0 in shape or (kind in TENSORS and None in shape and not (len(shape) == 1 and not in_steps)):
        return unsupported
    if kind == "Image":
        return (
            unsupported
            if around
            else Leaf(name, "image", dtype or "uint8", shape or (None, None, 3), in_steps=in_steps)
        )
    if kind == "Text" or (kind in TENSORS and dtype in TEXT_DTYPES):
        return Leaf(name, "text", "str", shape, in_steps=in_steps, ragged=around == 1)
    if kind in TENSORS and dtype in NUMBERS and encoding in ("none", "bytes", "zlib"):
        if None in shape:  # once per episode, of a length of its own: the same as a sequence of scalars
            shape, around = (), 1
        return Leaf(name, "number", dtype, shape, encoding, in_steps, around == 1)
    return unsupported


def _kind(node: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class name and settings of a feature, in the form of TFDS 4.5 and later or the one before it."""
    if "type" in node:
        return str(node["type"]).rsplit(".", 1)[-1], node.get("content") or {}
    kind = str(node["pythonClassName"]).rsplit(".", 1)[-1]
    contents = [value for key, value in node.items() if isinstance(value, dict) and key != "pythonClassName"]
    return kind, contents[0] if contents else {}


def _shape(value: Any) -> tuple[int | None, ...]:
    dimensions = value.get("dimensions", []) if isinstance(value, dict) else value or []
    return tuple(None if d is None or int(d) < 0 else int(d) for d in dimensions)


def unknown_key(key: str, leaves: dict[str, Leaf], where: Path) -> VlaError:
    """For a key that a rule wants and the dataset lacks."""
    return problem(f"no feature {key!r} in {where / FEATURES}", f"one of {', '.join(leaves)}",
                   "name the dataset this rule was made for")  # fmt: skip
