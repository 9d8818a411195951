"""A range of bytes is copied alike, whoever copies it."""

import errno
import os
from pathlib import Path

import pytest

from hf_lora.files.copy_range import copy_range

CONTENT = bytes(range(256)) * 5000


def copied(folder: Path) -> bytes:
    (folder / "from").write_bytes(CONTENT)
    with open(folder / "from", "rb") as source, open(folder / "to", "w+b") as target:
        target.write(b"before it")
        target.flush()
        copy_range(source.fileno(), 1001, target.fileno(), 7, 1_200_000)
    return (folder / "to").read_bytes()


def test_by_the_kernel(tmp_path: Path):
    assert copied(tmp_path) == b"before " + CONTENT[1001:1_201_001]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_the_kernel_cannot(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = 0

    def some(source: int, target: int, count: int, start: int, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(code, "not here")
        return os.pwrite(target, os.pread(source, 10, start), at)

    monkeypatch.setattr(os, "copy_file_range", some)
    assert copied(tmp_path) == b"before " + CONTENT[1001:1_201_001]


def test_where_there_is_no_such_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "copy_file_range")
    assert copied(tmp_path) == b"before " + CONTENT[1001:1_201_001]


def test_a_full_disk_is_not_taken_for_a_kernel_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        copied(tmp_path)


def test_a_file_that_ends_too_soon_is_an_error(tmp_path: Path):
    (tmp_path / "from").write_bytes(b"short")
    with (
        open(tmp_path / "from", "rb") as source,
        open(tmp_path / "to", "wb") as target,
        pytest.raises(OSError, match="became shorter"),
    ):
        copy_range(source.fileno(), 0, target.fileno(), 0, 100)
