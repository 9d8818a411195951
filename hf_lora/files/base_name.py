"""Naming another base model in an adapter's files: in the JSON and in the header's copy of it."""

import json
import shutil
import tempfile
from pathlib import Path

from hf_lora.files.atomic import as_json
from hf_lora.files.content import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.header import ADAPTER_CONFIG, HEADER_KEY
from hf_lora.files.read import AdapterFolder
from hf_lora.files.safetensors_io import serialize
from hf_lora.files.write import copy_folder


def copy_naming(adapter: AdapterFolder, directory: Path, base: str | None) -> None:
    """Copy an adapter's two files, replacing older ones, with ``base`` as the base model's name.

    Args:
        adapter: The adapter; ``directory`` may be its own folder.
        directory: Where to.
        base: Id of the base model; None to name none.

    Raises:
        AdapterFileError, SaveError: A file cannot be read or written; the folder is as it was.
    """
    changed = {} if adapter.base == base else {"base_model_name_or_path": base, "revision": None}
    fields = {**adapter.fields, **changed}
    with tempfile.TemporaryDirectory() as stage:
        (Path(stage) / CONFIG_FILE).write_bytes(as_json(fields))
        weights = Path(stage) / WEIGHTS_FILE
        if changed and adapter.header is not None:
            header = json.dumps({**adapter.header, ADAPTER_CONFIG: fields})
            tensors = dict(adapter.file.read(list(adapter.file.shapes)))
            with open(weights, "wb") as file:
                serialize(tensors, {**adapter.file.metadata, HEADER_KEY: header})(file)
        else:
            shutil.copyfile(adapter.file.path, weights)
        copy_folder(Path(stage), directory)
