"""A note that survives a save killed between its two renames: which JSON belongs to which weights.

Weights and JSON cannot be renamed at once. The note is put down before the first rename and taken
away after the second; a reader who finds it beside the weights that it names takes its JSON.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from hf_lora.errors import AdapterFileError, SaveError
from hf_lora.files.atomic import as_json, remove_abandoned, staged, sync_directory
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.opened import blocks, opened
from hf_lora.files.safe_json import read_json

PENDING_FILE = f".{CONFIG_FILE}.pending"
_FIELDS, _DIGEST = "adapter_config", "weights_sha256"


def put_note(directory: Path, weights: Path, text: bytes) -> None:
    """Note in ``directory`` that the JSON ``text`` belongs to the file ``weights``."""
    try:
        digest = file_digest(weights)
    except AdapterFileError as error:  # which was written a moment ago: the disk refuses
        raise SaveError(f"{error}") from error
    note = as_json({_FIELDS: json.loads(text), _DIGEST: digest})
    pending = directory / PENDING_FILE
    with staged(pending, lambda file: file.write(note)) as new_note:
        os.replace(new_note, pending)
    sync_directory(directory)


def take_note_away(directory: Path) -> None:
    """Delete the note, if there is one, and what a kill left of one."""
    remove_abandoned(directory / PENDING_FILE)
    with contextlib.suppress(OSError):
        (directory / PENDING_FILE).unlink()


def noted_fields(directory: Path) -> dict[str, Any] | None:
    """Return the JSON that belongs to the weights in ``directory``, if a note says so."""
    pending = directory / PENDING_FILE
    if not os.path.isfile(pending):
        return None
    try:
        note = read_json(pending)
        fields = note.get(_FIELDS)
        if isinstance(fields, dict) and note.get(_DIGEST) == file_digest(directory / WEIGHTS_FILE):
            return fields
    except (AdapterFileError, OSError):
        pass  # a note that cannot be read says nothing
    return None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with opened(path) as (file, size):
        for block in blocks(file, 0, size):
            digest.update(block)
    return digest.hexdigest()
