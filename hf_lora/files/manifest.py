"""The manifest of a checkpoint: what was saved together, with sizes and digests, and if all was.

It says "not complete" before the first part is written, and is replaced after the last by one that
lists them all. What reads like that was saved to its end and has not changed since.
"""

import contextlib
import fnmatch
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hf_lora.errors import AdapterFileError
from hf_lora.files.atomic import as_json, staged, sync_directory
from hf_lora.files.safe_json import read_json, show

MANIFEST_FILE = "checkpoint_manifest.json"
_FORMAT, _COMPLETE, _PARTS = "format", "complete", "parts"
_BYTES, _DIGEST = "bytes", "sha256"
_READ_AGAIN = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pkl", "trainer_state.json", "latest")
_NEVER_READ = "training_args.bin"
_BLOCK = 1 << 20


def begin_manifest(folder: Path) -> None:
    """Say that what is in ``folder`` is not complete; the folder is made if there is none.

    Raises:
        SaveError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {_FORMAT: 1, _COMPLETE: False})


def finish_manifest(folder: Path) -> None:
    """Flush all parts in ``folder`` that a resume reads, and say that they are complete.

    Raises:
        SaveError: It cannot be written.
    """
    parts = {}
    for path in parts_of(folder):
        size, digest = _size_and_digest(path, flush=True)
        parts[path.relative_to(folder).as_posix()] = {_BYTES: size, _DIGEST: digest}
    for directory in {folder, *(folder / name for name in parts)}:
        sync_directory(directory if directory.is_dir() else directory.parent)
    _write(folder, {_FORMAT: 1, _COMPLETE: True, _PARTS: dict(sorted(parts.items()))})


def has_manifest(folder: Path) -> bool:
    """Say whether there is a manifest in ``folder``."""
    return os.path.isfile(folder / MANIFEST_FILE)


def is_unfinished(folder: Path) -> bool:
    """Say whether a save of what is in ``folder`` was begun and not ended, by its manifest."""
    try:
        return has_manifest(folder) and read_json(folder / MANIFEST_FILE).get(_COMPLETE) is False
    except AdapterFileError:
        return False


def manifest_faults(folder: Path) -> list[str]:
    """Return a line for each thing in ``folder`` that is not as its manifest says."""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
    except AdapterFileError as error:
        return [f"{error}"]
    if manifest.get(_COMPLETE) is False:
        return ["its save was cut short"]
    parts = manifest.get(_PARTS)
    if not isinstance(parts, dict) or not all(isinstance(entry, dict) for entry in parts.values()):
        return [f"{MANIFEST_FILE} is damaged"]
    return [fault for name, entry in parts.items() if (fault := _fault(folder, name, entry))]


def _fault(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or "\0" in name:
        return f"{MANIFEST_FILE} names {show(name)}, which is no part of the checkpoint"
    path = folder / inside
    if not os.path.isfile(path):
        return f"{show(name)} is missing"
    try:
        size = os.path.getsize(path)
        if size != entry.get(_BYTES):
            return f"{show(name)} has {size} bytes, and had {show(entry.get(_BYTES))} when saved"
        if _size_and_digest(path)[1] != entry.get(_DIGEST):
            return f"{show(name)} is not what was saved (its sha256 differs)"
    except OSError as error:
        return f"{show(name)} cannot be read: {error}"
    return None


def parts_of(folder: Path) -> Iterator[Path]:
    """Yield every file in and below ``folder`` that a resume may read."""
    for directory, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            read = any(fnmatch.fnmatchcase(name, pattern) for pattern in _READ_AGAIN)
            if read and name != _NEVER_READ:
                yield Path(directory, name)


def _size_and_digest(path: Path, *, flush: bool = False) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if flush:
            # not every system flushes what is open for reading alone
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
    return size, digest.hexdigest()


def _write(folder: Path, fields: dict[str, Any]) -> None:
    path = folder / MANIFEST_FILE
    with staged(path, lambda file: file.write(as_json(fields))) as new:
        os.replace(new, path)
    sync_directory(folder)
