"""Writing an adapter folder."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_lora.errors import SaveError
from hf_lora.files.atomic import alone_in, as_json, made_folder, staged, sync_directory
from hf_lora.files.content import CONFIG_FILE, WEIGHTS_FILE, Content
from hf_lora.files.header import HEADER_KEY, make_header
from hf_lora.files.peft_format import to_peft
from hf_lora.files.pending import put_note, take_note_away
from hf_lora.files.read import read_folder
from hf_lora.files.safetensors_io import serialize


def write_folder(directory: Path, content: Content) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, replacing older ones.

    Killed at any moment, this leaves the old adapter or the new one.

    Raises:
        SaveError: The folder cannot be written; it is as it was.
    """
    fields = to_peft(content)
    metadata = {"format": "pt", HEADER_KEY: make_header(content, fields)}
    _write(directory, serialize(content.tensors, metadata), as_json(fields))


def copy_folder(source: Path, directory: Path) -> None:
    """Copy the two files of an adapter, replacing older ones as :func:`write_folder` does.

    Where there are only weights, ``adapter_config.json`` is written from what their header says.

    Raises:
        SaveError: A file cannot be read, or the folder cannot be written; it is as it was.
    """
    try:
        if os.path.lexists(source / CONFIG_FILE):
            text = (source / CONFIG_FILE).read_bytes()
        else:
            text = as_json(read_folder(source).fields)
        with open(source / WEIGHTS_FILE, "rb") as weights:
            _write(directory, lambda file: shutil.copyfileobj(weights, file), text)
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"{source} cannot be copied: {error}") from error


def _write(directory: Path, write_weights: Callable[[Any], None], text: bytes) -> None:
    weights, config = directory / WEIGHTS_FILE, directory / CONFIG_FILE
    with (
        made_folder(directory),
        staged(weights, write_weights) as new_weights,
        staged(config, lambda file: file.write(text)) as new_config,
        alone_in(directory),
    ):
        _replace(directory, new_weights, new_config, text)
        take_note_away(directory)


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
