"""Replacing files so that a reader, or a crash, sees the old one or the new one, never half."""

import contextlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_lora.errors import HfLoRAError, SaveError
from hf_lora.text import show

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextlib.contextmanager
def refused_as_save_error(what: str) -> Iterator[None]:
    """Turn what the disk refuses in the block into a SaveError that begins with ``what``."""
    try:
        yield
    except HfLoRAError:
        raise
    except OSError as error:
        raise SaveError(f"{what}: {error}") from error


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
        with refused_as_save_error(f"{path} could not be written"):
            # never through a link that somebody put there
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(temporary, flags, 0o666), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """Hand out a new folder that is gone after the block.

    Raises:
        SaveError: The disk refuses something, here or in the block; it begins with ``what``.
    """
    with refused_as_save_error(what), tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


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
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        _remove_empty(missing)
        raise SaveError(f"{show(str(directory))} cannot be a folder: {error}") from error
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
        with contextlib.suppress(OSError, ValueError):
            folder.rmdir()
