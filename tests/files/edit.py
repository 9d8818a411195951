"""Taking adapter files apart and writing them again with a fault in them."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

Tensors = dict[str, torch.Tensor]


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG).read_text())


def write_config(directory: Path, fields: Any) -> None:
    (directory / CONFIG).write_text(json.dumps(fields))


def change_config(directory: Path, **fields: Any) -> None:
    """Set fields of the JSON; the value ``...`` takes a field away."""
    config = read_config(directory) | fields
    write_config(directory, {name: v for name, v in config.items() if v is not ...})


def read_tensors(directory: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(directory / WEIGHTS, "pt") as file:
        # copies: the tensors of the library lie in the file, which is about to be overwritten
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def write_tensors(directory: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    save_file(tensors, directory / WEIGHTS, metadata=dict(metadata) or None)


def change_tensors(directory: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors and write them as PEFT does: without anything of ours in the header."""
    tensors, _ = read_tensors(directory)
    change(tensors)
    write_tensors(directory, tensors, {"format": "pt"})


def as_pefts(directory: Path, **fields: Any) -> None:
    """Take our part of the header away, as if PEFT had written the file, and change the JSON."""
    change_tensors(directory, lambda tensors: None)
    change_config(directory, **fields)


def read_header(directory: Path) -> tuple[dict[str, Any], bytes]:
    """Return the parsed header and the bytes behind it."""
    content = (directory / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(directory: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Write a file from a header (parsed or as text) and data, with a true or a given length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    (directory / WEIGHTS).write_bytes(start + text + data)
