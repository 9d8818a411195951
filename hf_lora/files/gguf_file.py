"""GGUF files of adapters, read as what they say of themselves: llama.cpp's own format.

Source: llama.cpp's ``docs/gguf.md`` (ggml), versions 2 and 3, little-endian: magic, version, how
many tensors and entries; the entries; name, sizes (the fastest first), type and place of each
tensor; the data, aligned. Everything is counted before it is believed.
"""

import math
import struct
from pathlib import Path
from typing import Any

import torch

from hf_lora.errors import AdapterFileError, UnsupportedAdapterError
from hf_lora.files.opened import opened
from hf_lora.files.safetensors_io import Entry, TensorFile, identity
from hf_lora.text import show

MAGIC = b"GGUF"

_LONGEST_HEADER = 32_000_000
_LONGEST_TEXT = 1_000_000
_LONGEST_NAME = 512
_MOST = 100_000
_MOST_DIMENSIONS = 4
_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# Numbers of the entries' types, to how Python unpacks them.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class GGUFFile(TensorFile):
    """A GGUF file whose header has been checked; tensors are read one by one.

    Raises:
        AdapterFileError: Truncated, lying, or not a GGUF file at all.
        UnsupportedAdapterError: A tensor is quantized.
    """

    def __init__(self, path: Path):
        self.path = path
        with opened(path) as (file, size):
            self._identity = identity(file)
            self._header = file.read(min(size, _LONGEST_HEADER))
        reader = _Reader(self._header, path)
        if reader.take(4) != MAGIC:
            raise AdapterFileError(f"{path} is no GGUF file")
        version = reader.number("I")
        if version not in (2, 3):
            raise AdapterFileError(f"{path}: version {version} of GGUF is not known, 2 and 3 are")
        tensors, entries = reader.count("tensors"), reader.count("entries")
        self.said: dict[str, Any] = {}
        """What the file says of itself, without its lists."""

        for _ in range(entries):
            name = reader.text()
            self.said[name] = reader.value(reader.number("I"))
        self.metadata = {}
        found = [reader.tensor() for _ in range(tensors)]
        self._header = self._header[: reader.at]
        aligned = self.said.get("general.alignment", 32)
        if not isinstance(aligned, int) or not 0 < aligned <= 1 << 16:
            raise AdapterFileError(f"{path}: general.alignment is {show(aligned)}")
        self._start = -(-reader.at // aligned) * aligned
        self._entries = dict(found)
        if len(self._entries) < len(found):
            raise AdapterFileError(f"{path}: a tensor stands twice")
        for name, entry in found:
            if self._start + entry.end > size:
                raise AdapterFileError(f"{path} is truncated: {show(name)} ends behind its end")
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def check_digest(self) -> None:
        """Do nothing: there is none."""


class _Reader:
    """What is left of a header."""

    def __init__(self, data: bytes, path: Path):
        self.at = 0
        self._data = data
        self._path = path

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self.at:
            raise AdapterFileError(f"{self._path} is truncated, or no GGUF file of an adapter")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        (found,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return found

    def count(self, what: str) -> int:
        found = self.number("Q")
        if found > _MOST:
            raise AdapterFileError(f"{self._path} claims {found} {what}, more than any adapter has")
        return found

    def text(self, longest: int = _LONGEST_TEXT) -> str:
        size = self.number("Q")
        if size > longest:
            raise AdapterFileError(f"{self._path}: a text of {size} bytes is too long")
        found = self.take(size).decode("utf-8", errors="replace")
        return found

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise AdapterFileError(f"{self._path}: an entry is of the unknown type {kind}")
        inside, size = self.number("I"), self.number("Q")
        if inside in _NUMBERS:
            self.take(size * struct.calcsize(f"<{_NUMBERS[inside]}"))
        elif inside == _TEXT and size <= _MOST * 10:
            for _ in range(size):
                self.text()
        else:
            raise AdapterFileError(f"{self._path}: a list of {size} of type {inside} is not read")
        return None

    def tensor(self) -> tuple[str, Entry]:
        name = self.text(_LONGEST_NAME)
        dimensions = self.number("I")
        if dimensions > _MOST_DIMENSIONS or not name.isprintable():
            raise AdapterFileError(f"{self._path}: the tensor {show(name)} is not sound")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind, begin = self.number("I"), self.number("Q")
        if kind not in _TYPES:
            raise UnsupportedAdapterError(
                f"{self._path}: {show(name)} is of type {kind}, which is quantized or unknown"
            )
        dtype = _TYPES[kind]
        return name, Entry(dtype, shape, begin, begin + math.prod(shape) * dtype.itemsize)
