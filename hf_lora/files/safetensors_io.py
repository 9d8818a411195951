"""Safetensors files: written with the same bytes every time, read only after they are checked.

The library's own writer orders the metadata by a hash that differs from run to run; a file of ours
is reproducible to the byte. Reading goes through the library, after a look at the header that it
does not take: duplicate names, and a checksum of the data.

Format: 8 bytes little-endian length of a JSON header, the header, the tensors one after another.
"""

import collections
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hf_lora.errors import AdapterFileError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_LONGEST_HEADER = 100_000_000
_BLOCK = 1 << 20


def serialize(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Callable[[Any], None]:
    """Return a function that writes the tensors to an open binary file.

    Tensors are ordered by name; ``metadata`` gains ``sha256``, the digest of the data.

    Raises:
        ValueError: A tensor has a type that the format cannot hold.
    """
    header: dict[str, Any] = {}
    chunks: list[memoryview] = []
    digest = hashlib.sha256()
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors cannot hold {tensor.dtype}")
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        digest.update(data)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
        chunks.append(data)
    sealed = dict(sorted({**metadata, "sha256": digest.hexdigest()}.items()))
    text = json.dumps({"__metadata__": sealed, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for chunk in chunks:
            file.write(chunk)

    return write


class TensorFile:
    """A safetensors file whose header has been checked; tensors are read one by one.

    Raises:
        AdapterFileError: Truncated, lying, or not a safetensors file at all.
    """

    def __init__(self, path: Path):
        self.path = path
        header = _header(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise AdapterFileError(f"{path}: the header's metadata is not a mapping")
        self.metadata: dict[str, str] = metadata
        try:
            with safe_open(path, framework="pt") as file:
                self.shapes = {
                    name: tuple(file.get_slice(name).get_shape())
                    for name in file.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterFileError(f"{path} is not a sound safetensors file: {error}") from error

    def check_digest(self) -> None:
        """Compare the data with the digest in the header, if there is one.

        Raises:
            AdapterFileError: The data is not what was written.
        """
        recorded = self.metadata.get("sha256")
        if recorded is None:
            return
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            file.seek(8 + length)
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != recorded:
            raise AdapterFileError(
                f"{self.path}: the tensors are not those that were saved (their sha256 differs "
                "from the one in the header); fetch or save the file again"
            )

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for ``names``.

        Raises:
            AdapterFileError: The file has changed or cannot be read.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise AdapterFileError(f"{self.path} cannot be read: {error}") from error


def _header(path: Path) -> dict[str, Any]:
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if length < 0 or length > min(size - 8, _LONGEST_HEADER):
                raise AdapterFileError(
                    f"{path} is truncated or no safetensors file: {size} bytes, of which the "
                    f"header claims {max(length, 0)}"
                )
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterFileError):
            raise AdapterFileError(f"{path}: {error}") from error
        raise AdapterFileError(f"{path} has no readable safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise AdapterFileError(f"{path}: the safetensors header is not a mapping")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [name for name, count in counts.most_common(5) if count > 1]
        raise AdapterFileError(f"the safetensors header names {', '.join(twice)} twice")
    return found
