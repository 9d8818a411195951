"""A note that survives a save of several adapters killed between two of them.

The folders of adapters that are saved together cannot be replaced at once. The note is put down in
the folder above them all before the first is replaced, and taken away after the last; as long as it
lies there, it says of each whether it is the one of that save.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_lora.errors import AdapterFileError, ConfigError
from hf_lora.files.atomic import as_json, remove_abandoned, staged, sync_directory
from hf_lora.files.commit_note import file_digest, noted_fields
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.safe_json import read_json
from hf_lora.layers.names import check_adapter_name

SET_FILE = ".adapters.pending"
_FOLDERS, _MIXED_BEFORE = "folders", "mixed_before"
_FIELDS, _DIGEST = "adapter_config", "weights_sha256"
_ITSELF = "."


@dataclasses.dataclass(frozen=True)
class _Set:
    """What a note says."""

    top: Path
    folders: dict[str, dict[str, Any]]
    """Folder, seen from ``top``, to what the save was to put there."""

    mixed_before: bool
    """Whether the adapters were of different saves already when this one began."""


def put_set_note(top: Path, new: Mapping[Path, tuple[Path, bytes]]) -> None:
    """Note in ``top`` what is about to replace the adapters in several folders.

    Args:
        top: The folder in which, or right below which, the adapters are.
        new: Folder to the file of its new weights and the text of its new JSON.
    """
    folders = {
        _seen_from(top, folder): {_DIGEST: file_digest(weights), _FIELDS: json.loads(text)}
        for folder, (weights, text) in new.items()
    }
    before = _read(top)
    _write(_Set(top, folders, mixed_before=before is not None and _is_mixed(before)))


def take_set_note_away(top: Path, *, unless_mixed: bool = False) -> None:
    """Delete the note, if there is one, and what a kill left of one.

    Args:
        top: The folder that it is in.
        unless_mixed: Keep it if the adapters that it names are of different saves now.
    """
    found = _read(top) if unless_mixed else None
    if found is not None and _is_mixed(found):
        return
    remove_abandoned(top / SET_FILE)
    with contextlib.suppress(OSError):
        (top / SET_FILE).unlink()


def has_set_note(top: Path) -> bool:
    """Say whether there is a note in ``top``."""
    return os.path.isfile(top / SET_FILE)


def leave_set(top: Path, directory: Path) -> None:
    """Take one adapter, which has just been replaced by itself, out of the note in ``top``."""
    found = _read(top)
    if found is None or _seen_from(top, directory) not in found.folders:
        return
    rest = {k: v for k, v in found.folders.items() if k != _seen_from(top, directory)}
    note = dataclasses.replace(found, folders=rest)
    if len(rest) > 1 and _is_mixed(note):
        _write(note)
    else:
        take_set_note_away(top)


def mixture(directory: Path) -> str | None:
    """Return in words why the adapter in ``directory`` may not fit those it was saved with."""
    for top in tops(directory):
        found = _read(top)
        if found is None or _seen_from(top, directory) not in found.folders:
            continue
        if _is_mixed(found):
            new = [name for name, entry in found.folders.items() if _is_new(found, name, entry)]
            old = [name for name in found.folders if name not in new]
            return (
                f"a save of several adapters into {top} was cut short, and they are of different "
                f"saves now: of the last {_shown(new)}, not so {_shown(old)}. Save them again, or "
                "take what was saved elsewhere"
            )
    return None


def tops(directory: Path) -> Iterator[Path]:
    """Yield the folders in which there can be a note about ``directory``: itself, and above."""
    whole = Path(os.path.abspath(directory))
    yield whole
    if whole.parent != whole:
        yield whole.parent


def _read(top: Path) -> _Set | None:
    if not has_set_note(top):
        return None
    try:
        note = read_json(top / SET_FILE)
        folders = note.get(_FOLDERS)
        if isinstance(folders, dict) and all(map(_is_entry, folders.items())):
            return _Set(top, folders, bool(note.get(_MIXED_BEFORE)))
    except AdapterFileError:
        pass  # a note that cannot be read says nothing
    return None


def _write(note: _Set) -> None:
    path = note.top / SET_FILE
    text = as_json({_FOLDERS: note.folders, _MIXED_BEFORE: note.mixed_before})
    with staged(path, lambda file: file.write(text)) as new_note:
        os.replace(new_note, path)
    sync_directory(note.top)


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    try:  # what becomes a path must not lead elsewhere
        return isinstance(entry, dict) and (name == _ITSELF or bool(check_adapter_name(name)))
    except ConfigError:
        return False


def _is_mixed(note: _Set) -> bool:
    new = [_is_new(note, name, entry) for name, entry in note.folders.items()]
    return not all(new) and (any(new) or note.mixed_before)


def _is_new(note: _Set, name: str, entry: dict[str, Any]) -> bool:
    """Say whether an adapter is the one that the noted save was to put there."""
    folder = note.top / name
    weights = folder / WEIGHTS_FILE
    if not os.path.isfile(weights):
        return False
    try:
        if file_digest(weights) != entry.get(_DIGEST):
            return False
        fields = noted_fields(folder)
        return (read_json(folder / CONFIG_FILE) if fields is None else fields) == entry.get(_FIELDS)
    except (AdapterFileError, OSError):
        return False


def _seen_from(top: Path, folder: Path) -> str:
    return os.path.relpath(folder, top)


def _shown(names: list[str]) -> str:
    words = ["the one in the folder itself" if n == _ITSELF else repr(n) for n in names]
    return ", ".join(words) or "none"
