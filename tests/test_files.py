"""Files are replaced whole, and what is no ordinary file is not replaced."""

import os
import stat

import pytest

from vla.files import UnwritableError, write_bytes


def test_a_device_stays_one(tmp_path):
    path = tmp_path / "null"
    path.symlink_to("/dev/null")  # a link, so that a fault replaces the link
    write_bytes(path, b"x")
    assert path.is_symlink() and stat.S_ISCHR(os.stat(path).st_mode)
    assert os.listdir(tmp_path) == ["null"]


def test_an_ordinary_file_is_replaced_and_a_folder_is_refused(tmp_path):
    write_bytes(tmp_path / "a/b", b"x")
    write_bytes(tmp_path / "a/b", b"y")
    assert (tmp_path / "a/b").read_bytes() == b"y" and os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(UnwritableError, match="Is a directory"):
        write_bytes(tmp_path / "a", b"x")
