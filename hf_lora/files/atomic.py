"""Replacing files so that a reader, or a crash, sees the old one or the new one, never half."""

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_lora.errors import SaveError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextlib.contextmanager
def staged(path: Path, write: Callable[[Any], None]) -> Iterator[Path]:
    """Write a file beside ``path`` and hand out its name; the block renames it when it is time.

    The file is on the disk, flushed, when the block begins; what the block leaves under that
    name is deleted.

    Raises:
        SaveError: It could not be written (a full disk, no permission); ``path`` is untouched.
    """
    remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{_owner()}.tmp")
    try:
        # never through a link that somebody put there
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"{path} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def made_folder(directory: Path) -> Iterator[None]:
    """Make a folder, with those above it; after an error take away those that were made.

    Raises:
        SaveError: It cannot be made.
    """
    missing = []
    for folder in (directory, *directory.parents):
        if os.path.lexists(folder):
            break
        missing.append(folder)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise SaveError(f"{directory} cannot be a folder: {error}") from error
    try:
        yield
    except BaseException:
        _remove_empty(missing)
        raise


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep other saves into the same folder waiting, where the file system can.

    The system lets go of the lock when the process ends, however it ends.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(directory, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_json(fields: dict[str, Any]) -> bytes:
    """Return indented JSON with a final newline: equal content, equal bytes.

    The fields are sorted; inside them the order is kept, because in a map of patterns it counts.
    """
    return (json.dumps(dict(sorted(fields.items())), indent=2) + "\n").encode()


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"


def remove_abandoned(path: Path) -> None:
    """Delete what a killed process of this machine, or this very thread, left half written."""
    named = re.compile(
        re.escape(f".{path.name}.{socket.gethostname()}-")
        + r"(?P<pid>[0-9]{1,9})-(?P<thread>[0-9]{1,20})\.tmp"
    )
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            found = named.fullmatch(name)
            if found and not _at_work(int(found["pid"]), int(found["thread"])):
                with contextlib.suppress(OSError):
                    os.unlink(path.with_name(name))


def _at_work(pid: int, thread: int) -> bool:
    if pid == os.getpid():
        # a number that a process had which is gone may be ours now
        others = {t.ident for t in threading.enumerate()} - {threading.get_ident()}
        return thread in others
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
