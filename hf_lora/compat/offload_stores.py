"""The stores in which accelerate keeps offloaded weights, and putting other weights there.

In memory a store is a table of tensors; on disk it is a table that says in which file each stands.
No file that was there is ever written to: a weight that comes goes into a file of its own, in the
same folder, and the table leads there, until the entry that stood in it is put back.
"""

import contextlib
import dataclasses
import os
import tempfile
import weakref
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from hf_lora.compat.accelerate import device_hooks
from hf_lora.errors import SaveError

_NAME_IN_FILE = "weight"


@dataclasses.dataclass
class OffloadEntry:
    """What a store holds for one tensor of a module, to be put back whatever stands there later."""

    weights: Any
    """The store as the module's hook sees it: from the tensor's own name to its value."""

    name: str
    table: MutableMapping[str, Any]
    """What of the store can be written to: tensors, or where in a file each one is."""

    key: str
    folder: str | None
    """Where files of the store are; None if the table holds tensors, or no folder was named."""

    held: Any

    def replace(self, tensor: torch.Tensor) -> None:
        """Put a tensor of the same shape in the place of what the store holds.

        Raises:
            SaveError: It cannot be written; the store holds what it held.
        """
        if isinstance(self.held, torch.Tensor):
            self.table[self.key] = tensor.detach().to(self.held.device)
        else:
            self.table[self.key] = _written(tensor, self.key, self.folder)

    def put_back(self) -> None:
        """Have the store hold again what it held."""
        self.table[self.key] = self.held

    def as_it_is(self) -> Callable[[], None]:
        """Return what has the store hold again what it holds now."""
        now = self.table[self.key]
        return lambda: self.table.__setitem__(self.key, now)

    def read(self) -> torch.Tensor:
        """Return the tensor that the store held."""
        now = self.table[self.key]
        self.table[self.key] = self.held
        try:
            return self.weights[self.name]
        finally:
            self.table[self.key] = now


def entry_of(module: nn.Module, name: str) -> OffloadEntry | None:
    """Return the entry from which accelerate fetches a tensor of ``module``, if it can be replaced.

    None if no hook of the module offloads, or if its store is of a kind that is not known here.
    """
    for hook in device_hooks(module):
        weights = getattr(hook, "weights_map", None)
        if getattr(hook, "offload", False) and weights is not None:
            found = _table(weights, name)
            if found is not None:
                return OffloadEntry(weights, name, *found)
    return None


def _table(weights: Any, name: str) -> tuple[MutableMapping[str, Any], str, str | None, Any] | None:
    key = name
    while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        key = f"{weights.prefix}{key}"
        weights = weights.dataset
    tables = [weights, getattr(weights, "state_dict", None), getattr(weights, "index", None)]
    for table in tables:
        if isinstance(table, MutableMapping) and key in table:
            return table, key, getattr(weights, "save_folder", None), table[key]
    return None


class _Written(dict):
    """An entry for a file that we wrote: when nothing refers to it any more, the file goes.

    Copies of a model refer to the same one.
    """

    def __copy__(self) -> "_Written":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Written":
        return self


def _written(tensor: torch.Tensor, key: str, folder: str | None) -> _Written:
    """Write a tensor into a new file and return an entry that leads there."""
    where = tempfile.gettempdir() if folder is None else folder
    path = None
    try:
        handle, path = tempfile.mkstemp(".safetensors", f"{key}.merged-", where)
        os.close(handle)
        save_file({_NAME_IN_FILE: tensor.detach().cpu().contiguous()}, path)
    except BaseException as error:
        if path is not None:
            _remove(path, os.getpid())
        if isinstance(error, (OSError, SafetensorError)):
            raise SaveError(
                f"The merged weight {key} cannot be written into {where}, where accelerate keeps "
                f"the offloaded weights: {error}"
            ) from error
        raise
    entry = _Written(safetensors_file=path, weight_name=_NAME_IN_FILE)
    weakref.finalize(entry, _remove, path, os.getpid())
    return entry


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # a forked process only has copies of the entries
        with contextlib.suppress(OSError):
            Path(path).unlink()
