"""Safetensors files: written with the same bytes every time, read only after they are checked.

The library's own writer orders the metadata by a hash that differs from run to run; a file of ours
is reproducible to the byte. Reading checks what the library checks, and more: names that stand
twice, names that no module can have, a digest of header and data, and that the file is still
the same one when its tensors are read.

Format: 8 bytes little-endian length of a JSON header, the header, the tensors one after another.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hf_lora.errors import AdapterFileError, SaveError
from hf_lora.files.opened import blocks, opened
from hf_lora.files.safe_json import parse_json
from hf_lora.text import show

DIGEST_KEY = "hf_lora_sha256"
"""The entry of the metadata that holds the digest of everything else in the file."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_NO_DIGEST = "0" * 64
_LONGEST_HEADER = 32_000_000
_MOST_TENSORS = 100_000
_LONGEST_NAME = 512
_MOST_DOTS = 64
_MOST_DIMENSIONS = 8


def can_hold(dtype: torch.dtype) -> bool:
    """Say whether a file can hold tensors of a type."""
    return dtype in _NAMES


def serialize(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Callable[[Any], None]:
    """Return a function that writes the tensors to an open binary file.

    Tensors are ordered by name; ``metadata`` gains a digest of the whole file.

    Raises:
        SaveError: A tensor has a type that the format cannot hold.
    """
    entries: dict[str, Any] = {}
    chunks: list[memoryview] = []
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _NAMES:
            raise SaveError(f"{name}: safetensors cannot hold {tensor.dtype}")
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
        chunks.append(data)
    header = _header_bytes({**metadata, DIGEST_KEY: _NO_DIGEST}, entries)
    digest = hashlib.sha256(header)
    for chunk in chunks:
        digest.update(chunk)
    header = _header_bytes({**metadata, DIGEST_KEY: digest.hexdigest()}, entries)

    def write(file: Any) -> None:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for chunk in chunks:
            file.write(chunk)

    return write


def dtype_called(name: str, source: str) -> torch.dtype:
    """Return the type that a header calls so.

    Raises:
        AdapterFileError: There is none; the message begins with ``source``.
    """
    if name not in _TYPES:
        raise AdapterFileError(
            f"{source} has the type {show(name)}, not one of {', '.join(_TYPES)}"
        )
    return _TYPES[name]


def lay_out(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[int]]:
    """Return what a file begins with, and where in it each tensor goes and the last one ends.

    Args:
        tensors: Name, type and shape of each, in order.
        metadata: As it stands in the header.
    """
    entries, ends = {}, [0]
    for name, dtype, shape in tensors:
        end = ends[-1] + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [ends[-1], end],
        }
        ends.append(end)
    header = _header_bytes(metadata, entries)
    begin = struct.pack("<Q", len(header)) + header
    return begin, [len(begin) + end for end in ends]


def _header_bytes(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    sealed = dict(sorted(metadata.items()))
    text = json.dumps({"__metadata__": sealed, **entries}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is in a file, after what comes before all of them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file whose header has been checked; tensors are read one by one.

    Raises:
        AdapterFileError: Truncated, lying, or not a safetensors file at all.
    """

    def __init__(self, path: Path):
        self.path = path
        with opened(path) as (file, size):
            self._identity = identity(file)
            self._header = _read_header(file, size, path)
        fields = parse_json(self._header, f"{path}: the safetensors header")
        self.metadata = _metadata(fields.pop("__metadata__", None), path)
        self._start = 8 + len(self._header)
        self._entries = _entries(fields, size - self._start, path)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def check_digest(self) -> None:
        """Compare the file with the digest in its header, if there is one.

        Raises:
            AdapterFileError: The file is not what was written.
        """
        recorded = self.metadata.get(DIGEST_KEY)
        if recorded is None:
            return
        sealed = f'"{DIGEST_KEY}":"{recorded}"'.encode()
        blank = f'"{DIGEST_KEY}":"{_NO_DIGEST}"'.encode()
        digest = hashlib.sha256(self._header.replace(sealed, blank))
        with self._open() as (file, size):
            for block in blocks(file, self._start, size):
                digest.update(block)
        if digest.hexdigest() != recorded:
            raise AdapterFileError(
                f"{self.path} is not what was saved (its sha256 differs from the one in its "
                "header): it was damaged or edited; fetch or save it again"
            )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for ``names``.

        Raises:
            AdapterFileError: The file has changed or cannot be read.
        """
        with self._open() as (file, _):
            for name in names:
                entry = self._entries[name]
                file.seek(self._start + entry.start)
                data = bytearray(entry.end - entry.start)
                if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                    raise AdapterFileError(f"{self.path} became shorter while it was read")
                flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
                tensor = flat.view(entry.dtype) if data else flat.to(entry.dtype)
                yield name, tensor.reshape(entry.shape)

    def pick(self, name: str, at: Sequence[int]) -> torch.Tensor:
        """Return single numbers of a flattened floating-point tensor, as float32.

        Raises:
            AdapterFileError: As for :meth:`read`.
        """
        entry = self._entries[name]
        size = entry.dtype.itemsize
        data = bytearray()
        with self._open() as (file, _):
            for place in at:
                file.seek(self._start + entry.start + place * size)
                data += file.read(size)
        if len(data) != size * len(at):
            raise AdapterFileError(f"{self.path} became shorter while it was read")
        return torch.frombuffer(data, dtype=entry.dtype).float() if data else torch.empty(0)

    def beginning(self) -> bytes:
        """Return what the file has before its first tensor."""
        return struct.pack("<Q", len(self._header)) + self._header

    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return the numbers from one place to another of a flattened tensor, in its own type.

        Raises:
            AdapterFileError: As for :meth:`read`.
        """
        entry = self._entries[name]
        data = bytearray((last - first) * entry.dtype.itemsize)
        with self._open() as (file, _):
            file.seek(self._start + entry.start + first * entry.dtype.itemsize)
            if file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise AdapterFileError(f"{self.path} became shorter while it was read")
        return torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0)

    def span(self, name: str) -> tuple[int, int]:
        """Return where a tensor's bytes begin and end in the file."""
        entry = self._entries[name]
        return self._start + entry.start, self._start + entry.end

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file, if it is still the one whose header was checked.

        Raises:
            AdapterFileError: It has changed or cannot be read.
        """
        with self._open() as (file, _):
            yield file

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, int]]:
        with opened(self.path) as (file, size):
            if identity(file) != self._identity:
                raise AdapterFileError(
                    f"{self.path} was replaced while it was being read; load it again"
                )
            yield file, size


def identity(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return what tells whether a file is still the same one."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_header(file: BinaryIO, size: int, path: Path) -> bytes:
    start = file.read(8) if size >= 8 else b""
    if len(start) < 8:
        raise AdapterFileError(f"{path} is truncated or no safetensors file: {size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise AdapterFileError(
            f"{path} is truncated or no safetensors file: it has {size} bytes, and its header "
            f"alone claims {length}"
        )
    if length > _LONGEST_HEADER:
        raise AdapterFileError(f"{path}: a header of {length} bytes is more than any adapter needs")
    return file.read(length)


def _metadata(found: Any, path: Path) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise AdapterFileError(f"{path}: the header's metadata is not a mapping of text")
    return found


def _entries(fields: dict[str, Any], size: int, path: Path) -> dict[str, Entry]:
    """Check that the tensors fill the ``size`` bytes of data exactly, each as its shape says."""
    if len(fields) > _MOST_TENSORS:
        raise AdapterFileError(f"{path} holds {len(fields)} tensors, more than any adapter has")
    entries = {}
    for name, entry in fields.items():
        fault = _name_fault(name) or _entry_fault(entry)
        if fault:
            raise AdapterFileError(f"{path}: the tensor {show(name)} {fault}")
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        entries[name] = Entry(_TYPES[dtype], tuple(shape), start, end)
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != reached:
            kind = "overlaps the one before it" if entry.start < reached else "leaves a gap"
            raise AdapterFileError(
                f"{path}: the tensor {name} {kind} (it begins at {entry.start}, not {reached})"
            )
        reached = entry.end
    if reached != size:
        raise AdapterFileError(
            f"{path} is truncated or too long: {size} bytes of data where its header claims "
            f"{reached}"
        )
    return entries


def _name_fault(name: str) -> str | None:
    if len(name) > _LONGEST_NAME or name.count(".") > _MOST_DOTS:
        return f"has a name of {len(name)} characters and {name.count('.')} dots"
    # nothing that could forge a line of a message or drive a terminal
    return None if name.isprintable() else "has a name with characters that no module has"


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        return f"has the type {show(dtype)}, which is not one of {', '.join(_TYPES)}"
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        return f"has the shape {show(shape)}"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the data_offsets {show(offsets)}"
    if math.prod(shape) * _TYPES[dtype].itemsize != offsets[1] - offsets[0]:
        return f"of type {dtype} and shape {show(shape)} cannot fill the bytes {show(offsets)}"
    return None


def _are_counts(value: Any) -> bool:
    return type(value) is list and all(type(item) is int and item >= 0 for item in value)
