"""Writing an adapter folder."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from hf_lora.errors import SaveError
from hf_lora.files.atomic import as_json, staged, sync_directory
from hf_lora.files.content import CONFIG_FILE, WEIGHTS_FILE, Content
from hf_lora.files.peft_format import to_peft
from hf_lora.files.safetensors_io import serialize

FORMAT = 1
HEADER_KEY = "hf_lora"
PENDING_FILE = f".{CONFIG_FILE}.pending"


def write_folder(directory: Path, content: Content) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, replacing older ones.

    Killed at any moment, this leaves the old adapter or the new one. The weights carry the whole
    configuration in their header and are replaced by one rename. Where the JSON changes as well,
    the new one is put beside the old one first: a reader that finds the new weights with the old
    JSON takes the pending one.

    Raises:
        SaveError: The folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{directory} cannot be a folder: {error}") from error
    weights, config, pending = (
        directory / name for name in (WEIGHTS_FILE, CONFIG_FILE, PENDING_FILE)
    )
    fields = as_json(to_peft(content))
    write = serialize(content.tensors, {"format": "pt", HEADER_KEY: json.dumps(header(content))})
    with (
        staged(weights, write) as new_weights,
        staged(config, lambda file: file.write(fields)) as new_config,
    ):
        if weights.exists() and config.exists() and config.read_bytes() != fields:
            os.replace(new_config, pending)
            sync_directory(directory)
            os.replace(new_weights, weights)
            os.replace(pending, config)
        else:
            os.replace(new_config, config)
            os.replace(new_weights, weights)
        sync_directory(directory)
    pending.unlink(missing_ok=True)


def header(content: Content) -> dict[str, Any]:
    """Return what the header of the weights says, so that the one file is complete."""
    return {
        "base": content.base,
        "config": content.config.to_dict(),
        "fingerprint": content.fingerprint,
        "format": FORMAT,
        "slots": {path: dataclasses.asdict(slot) for path, slot in content.slots.items()},
        "trained": list(content.trained),
    }
