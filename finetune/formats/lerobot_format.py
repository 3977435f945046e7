"""The files of a LeRobotDataset v3.0, as the reader and the writer both need them.

    meta/info.json  meta/stats.json  meta/tasks.parquet
    meta/episodes/chunk-000/file-000.parquet          one row per episode
    data/chunk-000/file-000.parquet                   one row per frame, one row group per episode
    videos/{video_key}/chunk-000/file-000.mp4         only for features of dtype "video"

`chunks_size` is the most files one chunk folder may hold. Written after the files lerobot 0.6.1 itself makes.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vla.jpeg import fault
from vla.types import VlaError, problem

VERSION = "v3.0"
V2_VERSIONS = ("v2.1", "v2.0")  # read by `lerobot_v21`; they differ in their statistics only, which are not read
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNKS_SIZE = 1000

AUTOMATIC = {  # the columns every dataset has, in this order, after the user's own
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
IMAGES_PREFIX = "observation.images."
SINGLE_IMAGE = "observation.image"
PNG_LEVEL = 1  # as lerobot: higher levels cost several times the time for a few per cent

_ARROW = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(),
          "string": pa.string()}  # fmt: skip
_PARQUET_ERRORS = (pa.ArrowException, OSError, EOFError)


def camera_of(key: str) -> str | None:
    """Feature key -> camera name, None if the key is not an image's: `observation.images.wrist` -> `wrist`."""
    if key == SINGLE_IMAGE:
        return "image"
    return key.removeprefix(IMAGES_PREFIX) if key.startswith(IMAGES_PREFIX) else None


def names_of(feature: dict[str, Any]) -> tuple[str, ...]:
    """One name per dimension; "0", "1", ... where the data has none. Accepts a list or {"motors": [...]}."""
    names, n = feature.get("names"), int(np.prod(feature["shape"]))
    if isinstance(names, dict):
        lists = [value for value in names.values() if isinstance(value, list)]
        names = lists[0] if len(lists) == 1 else None
    if isinstance(names, list) and len(names) == n:
        return tuple(str(name) for name in names)
    return tuple(str(i) for i in range(n))


def image_shape_of(feature: dict[str, Any]) -> tuple[int, int, int]:
    """(height, width, 3) of an image or video feature; older data gives channels first."""
    shape, names = list(feature["shape"]), feature.get("names")
    if len(shape) != 3:
        raise problem(f"an image of shape {shape}", "height, width and channels", f"mend {INFO_PATH}")
    if isinstance(names, list) and {"height", "width"} <= set(names):
        return int(shape[names.index("height")]), int(shape[names.index("width")]), 3
    channels_first = shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    height, width = shape[1:] if channels_first else shape[:2]
    return int(height), int(width), 3


def file_path(root: Path, pattern: str, chunk: int, file: int, video_key: str = "") -> Path:
    """The file of a `data_path` or `video_path` pattern, in the words of v3.0 (chunk_index, file_index) or of v2.x
    (episode_chunk, episode_index). The pattern comes with the data: it may not leave `root`."""
    try:
        name = pattern.format(chunk_index=chunk, file_index=file, episode_chunk=chunk, episode_index=file,
                              video_key=video_key)  # fmt: skip
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise problem(
            f"file pattern {pattern!r} in {root / INFO_PATH} ({error})", DATA_PATH, "mend the pattern"
        ) from error
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise problem(
            f"file pattern {pattern!r} in {root / INFO_PATH}", "a path inside the dataset", "mend the pattern"
        )
    return root / relative


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json`, with the fields a reader cannot do without. Unknown keys are kept and ignored."""
    path = root / INFO_PATH
    if not path.is_file():
        raise problem(f"no {path}", "the root of a LeRobotDataset", "pass the folder that holds meta/ and data/")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise problem(f"{path}: {error}", "JSON", "restore the file or download the dataset again") from error
    version = info.get("codebase_version") if isinstance(info, dict) else None
    if not str(version).startswith(("v3.", *V2_VERSIONS)):
        expected = f"{VERSION}, {' or '.join(V2_VERSIONS)}"
        raise problem(f"{path}: codebase_version {version!r}", expected, "convert the dataset with lerobot's converter")
    for name, kind in (("fps", (int, float)), ("features", dict), ("total_episodes", int), ("total_frames", int)):
        if not isinstance(info.get(name), kind):
            raise problem(f"{path}: {name} is {info.get(name)!r}", "a value as lerobot writes it", "mend info.json")
    for key, feature in info["features"].items():
        if not (isinstance(feature, dict) and isinstance(feature.get("dtype"), str) and feature.get("shape")):
            raise problem(f"{path}: feature {key!r} is {feature!r}", "dtype and shape", "mend info.json")
    return info


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file; VlaError naming it if it is missing, cut short or was never closed by its writer."""
    if not path.is_file():
        raise problem(f"no file {path}", "a parquet file", "copy the dataset again, or lower total_episodes")
    try:
        return pq.ParquetFile(path, memory_map=False)
    except _PARQUET_ERRORS as error:
        raise _broken(path, error) from error


def read_columns(path: Path, columns: list[str] | None = None, row_group: int | None = None) -> pa.Table:
    """Some columns of a parquet file, or of one row group of it."""
    file = open_parquet(path)
    missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
    if missing:
        raise problem(f"{path} without column {', '.join(missing)}", f"columns {', '.join(file.schema_arrow.names)}",
                      "copy the dataset again or mend meta/info.json")  # fmt: skip
    try:
        if row_group is not None:
            return file.read_row_group(row_group, columns=columns, use_threads=False)
        return file.read(columns=columns, use_threads=False)
    except _PARQUET_ERRORS as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> VlaError:
    reason = str(error).splitlines()[0]
    fix = "the file is cut short or its writer never finalized it: copy it again or remove its episodes"
    return problem(f"{path} ({path.stat().st_size} bytes): {reason}", "a whole parquet file with its footer", fix)


def column_array(column: pa.ChunkedArray, feature: dict[str, Any], where: str) -> np.ndarray:
    """An arrow column as numpy: (N, D) for vectors, (N,) for scalars. Fixed-size and variable lists both."""
    if column.null_count:
        raise problem(f"{where}: {column.null_count} empty values", "a value in every row", "repair the data")
    rows, width = len(column), int(np.prod(feature["shape"]))
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=object)
    depth, flat = 0, column.combine_chunks()
    flat = flat.combine_chunks() if isinstance(flat, pa.ChunkedArray) else flat
    while pa.types.is_list(flat.type) or pa.types.is_fixed_size_list(flat.type) or pa.types.is_large_list(flat.type):
        if not pa.types.is_fixed_size_list(flat.type) and depth == 0:
            lengths = np.diff(flat.offsets.to_numpy())
            if len(feature["shape"]) == 1 and (lengths != width).any():
                row = int(np.flatnonzero(lengths != width)[0])
                raise problem(f"{where}: {lengths[row]} values in row {row}", f"{width}", "repair the data")
        flat, depth = flat.flatten(), depth + 1
    values = flat.to_numpy(zero_copy_only=False)
    if values.size != rows * width:
        raise problem(
            f"{where}: {values.size} values in {rows} rows", f"{width} per row", "repair the data or info.json"
        )
    return values.reshape(rows, width) if depth or width > 1 else values


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (height, width, 3) RGB -> PNG, loss-free."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def decode_image(data: bytes | None, where: str) -> np.ndarray:
    """PNG or JPEG bytes -> uint8 (height, width, 3) RGB."""
    if not data:
        raise problem(f"{where}: no image bytes", "embedded PNG or JPEG", "export the dataset with embedded images")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise problem(
            f"{where}: {fault(error)}", "a PNG or JPEG image", "the frame is damaged: copy the file again"
        ) from error


def data_schema(features: dict[str, Any]) -> pa.Schema:
    """Arrow schema of a data file with the metadata Hugging Face `datasets` reads; video features have no column."""
    fields, described = [], {}
    for key, feature in features.items():
        width = feature["shape"][0]
        if feature["dtype"] == "video":
            continue
        if feature["dtype"] == "image":
            kind, about = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}
        else:
            kind, about = _ARROW[feature["dtype"]], {"dtype": feature["dtype"], "_type": "Value"}
            if feature["shape"] != [1]:
                kind = pa.list_(pa.field("element", kind), width)
                about = {"feature": about, "length": width, "_type": "List"}
        fields.append(pa.field(key, kind))
        described[key] = about
    fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    metadata = {"info": {"features": described}, "fingerprint": fingerprint}
    return pa.schema(fields, metadata={"huggingface": json.dumps(metadata)})


def tasks_table(tasks: list[str]) -> pa.Table:
    """tasks.parquet: a pandas frame whose index is named `task`, with one column `task_index`."""

    def column(name: str | None, field: str | None, kind: str, dtype: str, metadata: Any) -> dict[str, Any]:
        return {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": dtype, "metadata": metadata}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [column(None, None, "unicode", "object", {"encoding": "UTF-8"})],
        "columns": [column("task_index", "task_index", "int64", "int64", None),
                    column("task", "task", "unicode", "object", None)],
        "attributes": {}, "creator": {"library": "pyarrow", "version": pa.__version__}, "pandas_version": "2.3.3",
    }  # fmt: skip
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas)})
    return pa.table({"task_index": list(range(len(tasks))), "task": tasks}, schema=schema)


def parquet_bytes(table: pa.Table) -> bytes:
    """One row group, SNAPPY."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="snappy", row_group_size=max(1, len(table)))
    return sink.getvalue()
