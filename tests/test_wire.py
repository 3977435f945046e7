"""`vla.serve.wire` against bytes written by the package json_numpy 2.1.1, and against everything it must refuse."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from vla.serve import wire
from vla.types import VlaError

# (array, json_numpy.dumps(array)), written by json_numpy 2.1.1 with numpy 2.4
WRITTEN = [
    (np.arange(6, dtype=np.uint8).reshape(1, 2, 3), '{"__numpy__": "AAECAwQF", "dtype": "|u1", "shape": [1, 2, 3]}'),
    (np.array([0.5, -1.25, 3], np.float32), '{"__numpy__": "AAAAPwAAoL8AAEBA", "dtype": "<f4", "shape": [3]}'),
    (np.array([[1, 2], [3, 4]], ">i2"), '{"__numpy__": "AAEAAgADAAQ=", "dtype": ">i2", "shape": [2, 2]}'),
    (
        np.asfortranarray(np.arange(4.0).reshape(2, 2)),
        '{"__numpy__": "AAAAAAAAAAAAAAAAAADwPwAAAAAAAABAAAAAAAAACEA=", "dtype": "<f8", "shape": [2, 2]}',
    ),
    (np.array([True, False]), '{"__numpy__": "AQA=", "dtype": "|b1", "shape": [2]}'),
    (np.zeros((0, 3), np.float32), '{"__numpy__": "", "dtype": "<f4", "shape": [0, 3]}'),
    (np.int64(3), '{"__numpy__": "AwAAAAAAAAA=", "dtype": "<i8", "shape": []}'),
]


@pytest.mark.parametrize(("array", "text"), WRITTEN)
def test_same_text_as_json_numpy_both_ways(array: np.ndarray, text: str) -> None:
    assert wire.dumps(array) == text
    read = wire.decode(json.loads(text))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.asarray(array).dtype.newbyteorder("=") and read.dtype.isnative
    assert read.flags.writeable and read.flags.owndata or read.base is not None


def test_nested_values_as_json_numpy_writes_them() -> None:
    text = '[{"__numpy__": "AACAPwAAAEA=", "dtype": "<f4", "shape": [2]}]'
    assert wire.dumps([np.array([1, 2], np.float32)]) == text


def test_round_trip_of_random_arrays() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        dtype = rng.choice(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
        shape = tuple(rng.integers(0, 5, rng.integers(0, 5)))
        array = np.asarray(rng.normal(size=shape) * 100).astype(np.int64).astype(dtype)
        if rng.random() < 0.5:
            array = array.T
        read = wire.decode(json.loads(wire.dumps(array)))
        assert read.dtype == array.dtype and read.shape == array.shape
        np.testing.assert_array_equal(read, array)


def form(data: object = "AAECAwQF", dtype: object = "|u1", shape: object = (1, 2, 3)) -> dict[str, object]:
    return {"__numpy__": data, "dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape}


@pytest.mark.parametrize("dtype", ["O", "|O", "|V8", "V8", "<c8", "c16", "S4", "<U4", "<M8[s]", "3u1", "(2,)u1", "f16",
                                   "u1,u1", "object", "uint8", "g", None, 1, [["a", "<f4"]]])  # fmt: skip
def test_only_plain_dtypes(dtype: object) -> None:
    with pytest.raises(VlaError, match="expected a plain bool, integer or float dtype"):
        wire.decode(form(dtype=dtype))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (form(shape=(1, 2, 2)), "got x: 8 base64 characters; expected 8|got x: 6 bytes; expected 4 bytes"),
        (form(shape=(2, 2, 3)), "got x: 8 base64 characters; expected 16 for shape"),
        (form(shape=(-1, 6)), "expected at most 8 sizes, none negative"),
        (form(shape=(True, 6)), "none negative"),
        (form(shape=(1.0, 6)), "none negative"),
        (form(shape=(1,) * 9), "at most 8 sizes"),
        (form(shape="6"), "at most 8 sizes"),
        (form(shape=(10**6, 10**6)), "expected at most 64 MiB; fix: send a smaller array"),
        (form(shape=(2**62, 2**62, 0, 2**62, 6)), "base64 characters"),
        (form(data="AAEC!wQF"), "not base64"),
        (form(data="AA=CAwQF"), "not base64"),
        (form(data="ÄAECAwQF"[:8]), "not base64"),
        (form(data=None), "got x: NoneType"),
        ([1, 2], "got x: a JSON list of 2; expected a numpy array in json_numpy's form"),
        ({**form(), "extra": 1}, "an object with the keys"),
        ({"__numpy__": "AA=="}, "an object with the keys"),
        (None, "got x: null"),
        ("text", "text of 4 characters"),
    ],
)
def test_refused(value: object, message: str) -> None:
    with pytest.raises(VlaError, match=message):
        wire.decode(value, "x")


def test_a_limit_in_mebibytes_counts_the_decoded_bytes() -> None:
    data = base64.b64encode(bytes(2**20)).decode()
    assert wire.decode(form(data, shape=(2**20,)), max_mb=1.0).nbytes == 2**20
    with pytest.raises(VlaError, match="1048577 bytes; expected at most 1 MiB"):
        wire.decode(form(data, shape=(2**20 + 1,)), max_mb=1.0)


@pytest.mark.parametrize("array", [np.array([object()]), np.zeros(2, "c8"), np.array(["a"]), np.zeros(1, "f4,f4")])
def test_writing_refuses_what_reading_refuses(array: np.ndarray) -> None:
    with pytest.raises(VlaError, match="convert it first"):
        wire.dumps(array)
