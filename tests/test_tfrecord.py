"""TFRecord framing, tf.train.Example's wire format, dataset_info.json's splits.

The files in tests/fixtures/rlds were written by tensorflow_datasets 4.9.10 (TensorFlow 2.21): two `GeneratorBasedBuilder`s,
`tiny_arm` (train 7 and val 3 episodes in 3 shards each, plain vectors) and `nested_arm` (5 episodes in 2 shards, features by
`tfds.rlds.rlds_base`). tests/golden/rlds_splits.json is what `as_dataset(split=...)` read for each split string (episode_id
of each episode with interleave_cycle_length=1, or the error); rlds_percent.json is [episodes, split, first, stop] of
`AbstractSplit.from_spec(split).to_absolute`.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from vla.finetune.formats.tf_example import parse_example
from vla.finetune.formats.tfds_info import boundaries, dataset_root, read_dataset_info, select
from vla.finetune.formats.tfrecord import crc32c, masked_crc32c, read_record, read_records
from vla.types import VlaError

TESTS = Path(__file__).parent
RLDS = TESTS / "fixtures" / "rlds"
SPLITS = json.loads((TESTS / "golden" / "rlds_splits.json").read_text())
PERCENT = json.loads((TESTS / "golden" / "rlds_percent.json").read_text())
SHARD = RLDS / "tiny_arm" / "1.0.0" / "tiny_arm-train.tfrecord-00001-of-00003"


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def bitwise_crc(data: bytes) -> int:
    """The definition: polynomial division, one bit at a time."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, B.4, and the usual check value
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_crc32c_of_published_vectors(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


@pytest.mark.parametrize("n", [1, 7, 511, 512, 513, 519, 4099, 32768, 65537, 70001])
def test_crc32c_in_lanes_equals_its_definition(n: int) -> None:
    data = np.random.default_rng(n).bytes(n)
    assert crc32c(data) == bitwise_crc(data)


def test_records_of_tfds_have_valid_crcs() -> None:
    for path in sorted(RLDS.rglob("*tfrecord*")):
        records = list(read_records(path))
        assert records and all(record.fault is None for record in records)
        assert sum(len(record.data) + 16 for record in records) == path.stat().st_size


def test_skip_and_take_and_one_record_by_its_place() -> None:
    records = list(read_records(SHARD))
    assert [r.index for r in read_records(SHARD, 1, 1)] == [1]
    assert [r.data for r in read_records(SHARD, 1)] == [r.data for r in records[1:]]
    assert list(read_records(SHARD, 5)) == []
    assert read_record(SHARD, 2, records[2].offset, len(records[2].data)) == records[2].data


def test_flipped_bit_in_data_names_record_and_byte_and_reading_goes_on(tmp_path: Path) -> None:
    content, second = bytearray(SHARD.read_bytes()), list(read_records(SHARD))[1]
    content[second.offset + 100] ^= 4
    path = tmp_path / "shard"
    path.write_bytes(content)
    records = list(read_records(path))
    assert [r.fault is None for r in records] == [True, False, True]
    assert f"{path}: record 1 at byte {second.offset - 12}: the CRC of its data" in str(records[1].fault)
    with pytest.raises(VlaError, match="the CRC of its data does not match; expected .*; fix: copy the file again"):
        read_record(path, 1, second.offset, len(second.data))


def test_flipped_bit_in_length_ends_the_file(tmp_path: Path) -> None:
    content, second = bytearray(SHARD.read_bytes()), list(read_records(SHARD))[1]
    content[second.offset - 12] ^= 1
    path = tmp_path / "shard"
    path.write_bytes(content)
    records = list(read_records(path))
    assert [r.fault is None for r in records] == [True, False]
    assert f"record 1 at byte {second.offset - 12}: the CRC of its length" in str(records[1].fault)


@pytest.mark.parametrize("cut", [1, 4, 10, 2000])
def test_truncated_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "shard"
    path.write_bytes(SHARD.read_bytes()[:-cut])
    records = list(read_records(path))
    assert [r.fault is None for r in records] == [True, True, False]
    assert f"record 2 at byte {records[2].offset - 12} is cut off, the file ends at byte {path.stat().st_size}" in str(
        records[2].fault
    )


def test_truncated_in_the_header_and_an_honest_crc_of_a_length_beyond_the_end(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(framed(b"abc") + b"\x01\x02")
    assert "record 1 at byte 19 is cut off" in str(list(read_records(path))[1].fault)
    length = struct.pack("<Q", 1 << 60)
    path.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + b"x")
    assert "is cut off" in str(next(read_records(path)).fault)


def test_missing_file() -> None:
    with pytest.raises(VlaError, match="nowhere: No such file or directory; expected a shard"):
        list(read_records(Path("nowhere")))


def field(number: int, wire: int, payload: bytes) -> bytes:
    tag = varint(number << 3 | wire)
    return tag + (varint(len(payload)) if wire == 2 else b"") + payload


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = []
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def example(**features: bytes) -> bytes:
    entries = [field(1, 2, field(1, 2, key.encode()) + field(2, 2, value)) for key, value in features.items()]
    return field(1, 2, b"".join(entries))


NUMBERS = [0, 1, 127, 128, 300, -1, -(2**63), 2**63 - 1, 2**32]


def test_numbers_packed_and_unpacked_and_strings() -> None:
    floats = np.array([1.5, -2.0, np.nan], "<f4")
    record = example(
        packed=field(3, 2, field(1, 2, b"".join(varint(n) for n in NUMBERS))),
        unpacked=field(3, 2, b"".join(field(1, 0, varint(n)) for n in NUMBERS)),
        both=field(3, 2, field(1, 2, b"\x01\x02") + field(1, 0, b"\x03")),
        floats=field(2, 2, field(1, 2, floats.tobytes())),
        loose=field(2, 2, b"".join(field(1, 5, x.tobytes()) for x in floats)),
        strings=field(1, 2, field(1, 2, b"one") + field(1, 2, b"") + field(1, 2, b"three")),
        nothing=b"",
        none=field(3, 2, b""),
    )
    found = parse_example(record, "here")
    assert found["packed"].values.tolist() == found["unpacked"].values.tolist() == NUMBERS
    assert found["both"].values.tolist() == [1, 2, 3]
    for key in ("floats", "loose"):
        np.testing.assert_array_equal(found[key].values, floats)
        assert found[key].values.dtype == np.float32
    assert [record[a : a + n] for a, n in found["strings"].values] == [b"one", b"", b"three"]
    assert (found["nothing"].kind, found["none"].kind, len(found["none"].values)) == ("", "int", 0)
    assert parse_example(record, "here", {"both"}).keys() == {"both"}


def test_unknown_fields_are_passed_over_and_a_later_entry_holds() -> None:
    feature = field(9, 1, bytes(8)) + field(3, 2, field(7, 0, b"\x05") + field(1, 0, b"\x2a"))
    record = field(8, 5, bytes(4)) + example(a=field(3, 2, field(1, 0, b"\x01"))) + example(a=feature)
    assert parse_example(record, "here")["a"].values.tolist() == [42]


@pytest.mark.parametrize(
    "record",
    [
        b"\x0a\xff\xff\xff\x7f",  # longer than the record
        b"\x0b",  # a group: wire type 3
        b"\x0a",  # no length
        b"\xff" * 11,  # a varint without an end
        b"\x00\x01",  # field number 0
        example(a=field(2, 2, field(1, 2, b"123"))),  # floats of 3 bytes
        example(a=field(3, 2, field(1, 2, b"\x80"))),  # a varint that goes on
        example(a=field(3, 2, field(1, 2, b"\x80" * 11 + b"\x01"))),
    ],
)
def test_damaged_example_names_place(record: bytes) -> None:
    with pytest.raises(
        VlaError, match=r"shard 3: no tf\.train\.Example, byte \d+ of it is damaged; expected .*--skip-bad"
    ):
        parse_example(record, "shard 3")


def test_no_bytes_make_the_parser_fail_otherwise() -> None:
    rng, record = np.random.default_rng(0), bytearray(next(read_records(SHARD)).data)
    for _ in range(300):
        broken = bytearray(record)
        for at in rng.integers(0, 1600, 3):
            broken[at] = rng.integers(256)
        try:
            parse_example(bytes(broken[: rng.integers(1, len(broken))]), "x")
        except VlaError:
            pass


def ids(split: str) -> list[int]:
    found, key = [], "episode_metadata/episode_id"
    for part in select(read_dataset_info(dataset_root(RLDS / "tiny_arm")), split):
        found += [
            parse_example(r.data, "", {key})[key].values[0] for r in read_records(part.path, part.skip, part.take)
        ]
    return [int(n) for n in found]


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_tfds_own(split: str) -> None:
    if isinstance(SPLITS[split], list):
        assert ids(split) == SPLITS[split]
    else:
        with pytest.raises(VlaError, match="split|slice"):
            ids(split)


@pytest.mark.parametrize(("n", "split", "first", "stop"), PERCENT)
def test_percentages_round_as_in_tfds(n: int, split: str, first: int, stop: int) -> None:
    assert boundaries(split[6:-1], (n,)) == (first, stop)


def test_split_errors_help() -> None:
    info = read_dataset_info(dataset_root(RLDS / "tiny_arm"))
    with pytest.raises(VlaError, match="split 'tran' .*expected one of train, val; fix: use 'train'"):
        select(info, "tran")
    with pytest.raises(
        VlaError, match=r"'train\[95%:\]'.* selects no episode; expected one that does \(train has 7, val has 3"
    ):
        select(info, "train[95%:]")
    with pytest.raises(VlaError, match=r"slice \[:9\]; expected one within the 7 episodes"):
        select(info, "train[:9]")


def test_root_may_be_the_version_or_above(tmp_path: Path) -> None:
    assert dataset_root(RLDS / "tiny_arm") == dataset_root(RLDS / "tiny_arm" / "1.0.0")
    with pytest.raises(
        VlaError, match="2 datasets or versions .*nested_arm/0.1.0, tiny_arm/1.0.0.*; expected one; fix: name one"
    ):
        dataset_root(RLDS)
    with pytest.raises(VlaError, match="without dataset_info.json; expected a TFDS dataset"):
        dataset_root(tmp_path)
    with pytest.raises(VlaError, match="no such folder"):
        dataset_root(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fileFormat": "array_record"}, "fileFormat 'array_record'; expected 'tfrecord'"),
        ({"name": None}, "without a name or splits"),
        ({"splits": [{"name": "train"}]}, "split 'train' without shardLengths"),
        ({"splits": [{"shardLengths": ["x"]}]}, "splits entry"),
        ({"splits": ["train"]}, "splits entry"),
    ],
)
def test_odd_dataset_info(tmp_path: Path, change: dict, message: str) -> None:
    root = tmp_path / "1.0.0"
    shutil.copytree(RLDS / "tiny_arm" / "1.0.0", root)
    path = root / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(VlaError, match=message):
        read_dataset_info(root)
    path.write_text("{")
    with pytest.raises(VlaError, match="dataset_info.json: .*; expected JSON"):
        read_dataset_info(root)
