"""A model's checkpoint on disk: safetensors, in one file or in shards, with what stands beside."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_lora.errors import AdapterFileError, BaseLoadError, HfLoRAError, listing
from hf_lora.file_merging.packed import Packed, packed_in
from hf_lora.file_merging.side_files import WEIGHTS
from hf_lora.files.other_kind import adapter_in
from hf_lora.files.safe_json import read_json
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.text import show, some

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Table:
    """What a file of tensors holds, in the order of its bytes."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, file: TensorFile) -> "Table":
        """Return that of a file that is here."""
        order = sorted(file.shapes, key=file.span)
        return cls({n: file.shapes[n] for n in order}, {n: file.dtypes[n] for n in order})


class Checkpoint:
    """A checkpoint in a folder."""

    def __init__(self, directory: Path):
        """Read everything but the tensors.

        Raises:
            BaseLoadError: It is none, or is damaged; everything that is wrong is named.
        """
        self.directory = directory
        if not (directory / CONFIG).is_file():
            raise BaseLoadError(f"The base {self.name} has no {CONFIG}: it is no model's folder")
        with as_base_error(directory):
            self.config = read_json(directory / CONFIG)
            self.index, names = self._names()
            self.stored = {name: self._table(name) for name in names}
            self.packed: dict[str, Packed] = {}
            """Name of each tensor that is held packed, to what says how."""

            self.tables = {name: self._unpacked(name, self.stored[name]) for name in names}
        self.where = {tensor: name for name, t in self.tables.items() for tensor in t.shapes}
        self._check()

    def numbers(self, file: TensorFile, tensor: str, begin: int, end: int) -> torch.Tensor:
        """Return the numbers of a tensor from one place to another, flattened.

        Args:
            file: The file that it is in, opened.
            tensor: Its name.
            begin: Where they begin.
            end: Where they end.
        """
        packed = self.packed.get(tensor)
        if packed is None:
            return file.part(tensor, begin, end)
        return packed.numbers(file, begin, end)

    @property
    def name(self) -> str:
        """What it is called, for people."""
        return str(self.directory)

    @property
    def commit(self) -> str | None:
        """Which commit on the Hub it is, if it is from there."""
        return None

    @property
    def at_hand(self) -> frozenset[str]:
        """Which of its files can be read without a download."""
        return frozenset(self.tables)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.tables[self.where[tensor]].shapes[tensor]

    def dtype(self, tensor: str) -> torch.dtype:
        """Return a tensor's type."""
        return self.tables[self.where[tensor]].dtypes[tensor]

    @contextlib.contextmanager
    def opened(self, shard: str) -> Iterator[TensorFile]:
        """Have one of its files here for as long as a block lasts.

        Raises:
            BaseLoadError: It is damaged, or is not there any more.
        """
        with as_base_error(self.name):
            file = self._file(shard)
        yield file

    def identity(self) -> dict[str, Any]:
        """Return what tells it from another, or from itself after a change."""
        found = {}
        for shard in self.tables:
            status = os.stat(self.directory / shard)
            found[shard] = [status.st_size, status.st_mtime_ns]
        return {"folder": str(self.directory.resolve()), "shards": found}

    def _unpacked(self, shard: str, table: Table) -> Table:
        """Return what a file holds once everything that is packed in it is read as numbers."""
        if not self.config.get("quantization_config"):
            return table
        found = {each.name: each for each in packed_in(self.config, self._file(shard))}
        self.packed |= found
        hidden = {name for each in found.values() for name in each.beside}
        names = [name for name in table.shapes if name not in hidden]
        return Table(
            {n: found[n].shape if n in found else table.shapes[n] for n in names},
            {n: found[n].dtype if n in found else table.dtypes[n] for n in names},
        )

    def _table(self, shard: str) -> Table:
        return Table.of(self._file(shard))

    def _file(self, shard: str) -> TensorFile:
        return TensorFile(self.directory / shard)

    def _names(self) -> tuple[dict[str, Any] | None, list[str]]:
        files = self._listing()
        if INDEX in files:
            index = read_json(self.directory / INDEX)
            mapped = index.get("weight_map")
            shards = set(mapped.values()) if isinstance(mapped, dict) else set()
            odd = [name for name in shards if not isinstance(name, str) or Path(name).name != name]
            if odd or not shards:
                raise AdapterFileError(f"{INDEX} names no files beside it: {show(odd)}")
            lost = sorted(shards - files)
            if lost:
                raise AdapterFileError(f"{INDEX} names {some(lost)}, which is not there")
            return index, sorted(shards)
        if SINGLE not in files:
            held = [name for name in files if name.endswith(WEIGHTS)]
            what = f"its weights are {some(sorted(held))}" if held else "there are no weights"
            raise AdapterFileError(
                f"neither {SINGLE} nor {INDEX} is in it; {what}. Save it as safetensors first: "
                "AutoModel.from_pretrained(...).save_pretrained(...)"
            )
        return None, [SINGLE]

    def _listing(self) -> set[str]:
        return set(os.listdir(self.directory))

    def _check(self) -> None:
        mapped = (self.index or {}).get("weight_map")
        problems = [
            f"{tensor} is not in {shard}, where {INDEX} has it"
            for tensor, shard in (mapped or {}).items()
            if tensor not in self.stored[shard].shapes
        ]
        found = adapter_in(self._listing())
        if found:
            problems.append(f"it holds an adapter as well ({', '.join(found)})")
        if problems:
            raise BaseLoadError(listing(f"{self.name} is no sound checkpoint", problems))


def as_json(content: Any) -> bytes:
    """Return JSON as transformers writes it, in the order that it has."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def as_base_error(name: object) -> Iterator[None]:
    """Turn what is wrong with a file of a checkpoint into a BaseLoadError that names it."""
    try:
        yield
    except AdapterFileError as error:
        raise BaseLoadError(f"The base {name} cannot be read: {error}") from error
    except OSError as error:
        if isinstance(error, HfLoRAError):
            raise
        raise BaseLoadError(f"The base {name} cannot be read: {error}") from error
