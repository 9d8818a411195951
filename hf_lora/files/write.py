"""Writing adapter folders."""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_lora.errors import SaveError
from hf_lora.files.atomic import alone_in, as_json, made_folder, staged, sync_directory
from hf_lora.files.commit_note import put_note, take_note_away
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE, AdapterData
from hf_lora.files.header import HEADER_KEY, make_header
from hf_lora.files.opened import content, copy_into
from hf_lora.files.other_kind import check_no_model
from hf_lora.files.peft_format import to_peft
from hf_lora.files.read import read_folder
from hf_lora.files.safe_json import parse_json
from hf_lora.files.safetensors_io import TensorFile, serialize
from hf_lora.files.set_note import (
    has_set_note,
    leave_set,
    put_set_note,
    take_set_note_away,
    tops,
)

Weights = Callable[[Any], None]
"""What writes an adapter's weights into an open file."""


def write_folder(directory: Path, adapter: AdapterData) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, replacing older ones.

    Killed at any moment, this leaves the old adapter or the new one.

    Raises:
        SaveError: The folder holds a full model, or cannot be written; it holds the old adapter or
            the new one.
    """
    write_folders(directory, {directory: adapter})


def write_folders(top: Path, contents: Mapping[Path, AdapterData]) -> None:
    """Write several adapters that belong together, each as :func:`write_folder` does.

    Killed at any moment, this leaves all as they were, or all new, or a note in ``top`` that makes
    whoever loads one of them hear that they are of different saves.

    Args:
        top: The folder in which, or right below which, the adapters are.
        contents: Folder to what shall be in it.

    Raises:
        SaveError: A folder cannot be written.
    """
    new = {}
    for folder, adapter in contents.items():
        fields = to_peft(adapter)
        metadata = {"format": "pt", HEADER_KEY: make_header(adapter, fields)}
        new[folder] = serialize(adapter.tensors, metadata), as_json(fields)
    _write(top, new)


def copy_folder(source: Path, directory: Path) -> None:
    """Copy the two files of an adapter, replacing older ones as :func:`write_folder` does.

    Where there are only weights, ``adapter_config.json`` is written from what their header says.

    Raises:
        AdapterFileError: A file cannot be read, or is not what its name says.
        SaveError: The folder cannot be written; it holds the old adapter or the new one.
    """
    copy_folders(directory, {directory: source})


def copy_folders(top: Path, sources: Mapping[Path, Path]) -> None:
    """Copy several adapters that belong together, replacing as :func:`write_folders` does.

    Args:
        top: The folder in which, or right below which, the copies are.
        sources: Folder to the one that it becomes a copy of.

    Raises:
        AdapterFileError: A file cannot be read, or is not what its name says.
        SaveError: A folder cannot be written.
    """
    new = {folder: _copied(source) for folder, source in sources.items()}
    _write(top, new)


def _copied(source: Path) -> tuple[Weights, bytes]:
    if os.path.lexists(source / CONFIG_FILE):
        text = content(source / CONFIG_FILE)
        parse_json(text, str(source / CONFIG_FILE))
    else:
        text = as_json(read_folder(source).fields)
    TensorFile(source / WEIGHTS_FILE)  # nothing takes an adapter's place that is none
    return lambda file: copy_into(file, source / WEIGHTS_FILE), text


def _write(top: Path, new: Mapping[Path, tuple[Weights, bytes]]) -> None:
    for folder in new:
        check_no_model(folder)
    with contextlib.ExitStack() as stack:
        files = {}
        # all is on the disk before the first is replaced: what cannot be written is found out here
        for folder, (write_weights, text) in new.items():
            stack.enter_context(made_folder(folder))
            weights = stack.enter_context(staged(folder / WEIGHTS_FILE, write_weights))
            config = stack.enter_context(
                staged(folder / CONFIG_FILE, lambda file, text=text: file.write(text))
            )
            files[folder] = weights, config, text
        together = len(files) > 1
        above = (
            [top] if together else [f for folder in files for f in tops(folder) if has_set_note(f)]
        )
        # from above to below, as all do, so that no two wait for each other, and each once
        for folder in sorted({os.path.realpath(folder) for folder in (*above, *files)}):
            stack.enter_context(alone_in(Path(folder)))
        if together:
            put_set_note(top, {folder: (w, text) for folder, (w, _, text) in files.items()})
        try:
            for folder, (weights, config, text) in files.items():
                _replace(folder, weights, config, text)
                take_note_away(folder)
        except BaseException:
            if together:
                take_set_note_away(top, unless_mixed=True)
            raise
        if together:
            take_set_note_away(top)
        else:
            for folder in files:
                for noted in above:
                    leave_set(noted, folder)


def _replace(directory: Path, new_weights: Path, new_config: Path, text: bytes) -> None:
    """Put the two new files in place, in an order of which every beginning can be read."""
    weights, config = directory / WEIGHTS_FILE, directory / CONFIG_FILE
    for path in (weights, config):
        if os.path.isdir(path):
            raise SaveError(f"{path} is a folder")
    if os.path.isfile(config) and config.read_bytes() == text:
        os.replace(new_weights, weights)
        sync_directory(directory)
        return
    put_note(directory, new_weights, text)
    try:
        os.replace(new_weights, weights)
    except BaseException:
        take_note_away(directory)
        raise
    sync_directory(directory)
    os.replace(new_config, config)
    sync_directory(directory)
