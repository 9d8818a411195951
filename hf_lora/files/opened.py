"""Opening a file that a stranger may have put there: an ordinary one, or at once an error."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hf_lora.errors import AdapterFileError

_BLOCK = 1 << 20

# Without these, opening a pipe waits for its writer, and a terminal may become ours.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open an ordinary file for reading; yield it and its size in bytes.

    What is open is asked, not the path: it may be another file by now. Readers stop at that size:
    the kernel's own files claim 0 bytes and may never end.

    Raises:
        AdapterFileError: It is missing, a pipe, a device or a folder, or cannot be opened or read.
    """
    try:
        handle = os.open(path, _FLAGS | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise AdapterFileError(f"{path} is no ordinary file")
    with open(handle, "rb") as file:
        try:
            yield file, status.st_size
        except OSError as error:
            raise AdapterFileError(f"{path} cannot be read: {error}") from error


def blocks(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """Yield what a file holds between two places, in pieces that fit any memory."""
    file.seek(begin)
    for at in range(begin, end, _BLOCK):
        yield file.read(min(_BLOCK, end - at))


def content(path: Path) -> bytes:
    """Return all that an ordinary file holds.

    Raises:
        AdapterFileError: As for :func:`opened`.
    """
    with opened(path) as (file, size):
        return file.read(size)


def copy_into(target: BinaryIO, path: Path) -> None:
    """Copy an ordinary file into one that is open.

    Raises:
        AdapterFileError: As for :func:`opened`.
    """
    with opened(path) as (file, size):
        for block in blocks(file, 0, size):
            target.write(block)
