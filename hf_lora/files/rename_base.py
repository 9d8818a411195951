"""Naming another base model in an adapter's files: in the JSON and in the header's copy of it."""

import json
from pathlib import Path

from hf_lora.files.atomic import as_json, temporary_folder
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.header import ADAPTER_CONFIG, HEADER_KEY
from hf_lora.files.opened import copy_into
from hf_lora.files.read import AdapterFolder
from hf_lora.files.safetensors_io import serialize
from hf_lora.files.write import copy_folder


def copy_with_base(adapter: AdapterFolder, directory: Path, base: str | None) -> None:
    """Copy an adapter's two files, replacing older ones, with ``base`` as the base model's name.

    Args:
        adapter: The adapter; ``directory`` may be its own folder.
        directory: Where to.
        base: Id of the base model; None to name none.

    Raises:
        AdapterFileError, SaveError: A file cannot be read or written; the folder has the adapter
            that it had, or the new one.
    """
    changed = {} if adapter.base == base else {"base_model_name_or_path": base, "revision": None}
    fields = {**adapter.fields, **changed}
    with temporary_folder(f"{directory} could not be written") as stage:
        (stage / CONFIG_FILE).write_bytes(as_json(fields))
        with open(stage / WEIGHTS_FILE, "wb") as file:
            if changed and adapter.header is not None:
                header = json.dumps({**adapter.header, ADAPTER_CONFIG: fields})
                tensors = dict(adapter.file.read(list(adapter.file.shapes)))
                serialize(tensors, {**adapter.file.metadata, HEADER_KEY: header})(file)
            else:
                copy_into(file, adapter.file.path)
        copy_folder(stage, directory)
