"""Replacing files so that a reader, or a crash, sees the old one or the new one, never half."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_lora.errors import SaveError


@contextlib.contextmanager
def staged(path: Path, write: Callable[[Any], None]) -> Iterator[Path]:
    """Write a file beside ``path`` and hand out its name; the block renames it when it is time.

    The file is on the disk, flushed, when the block begins; what the block leaves under that
    name is deleted.

    Raises:
        SaveError: It could not be written (a full disk, no permission); ``path`` is untouched.
    """
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{_owner(os.getpid())}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(directory, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_json(fields: Any) -> bytes:
    """Return sorted, indented JSON with a final newline: equal content, equal bytes."""
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _owner(pid: int) -> str:
    return f"{socket.gethostname()}-{pid}"


def _remove_abandoned(path: Path) -> None:
    """Delete what a killed process of this machine left behind while it wrote the same file."""
    start, end = f".{path.name}.{socket.gethostname()}-", ".tmp"
    for other in path.parent.glob(f".{path.name}.*.tmp"):
        pid = other.name.removeprefix(start).removesuffix(end)
        if other.name.startswith(start) and pid.isdigit() and not _alive(int(pid)):
            other.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
