"""Two checkpoints of one architecture, side by side: one tensor of each in memory at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from hf_lora.errors import BaseLoadError, listing
from hf_lora.file_merging.base import CheckpointBase
from hf_lora.file_merging.checkpoint import Checkpoint
from hf_lora.file_merging.hub_checkpoint import HubCheckpoint

Source = str | os.PathLike[str]


def open_checkpoint(source: Source, revision: str | None, token: str | bool | None) -> Checkpoint:
    """Return a checkpoint: a folder that exists, else a repo on the Hub.

    Raises:
        BaseLoadError, HubError: It is none, or cannot be reached.
    """
    if isinstance(source, os.PathLike) or os.path.exists(source):
        return Checkpoint(Path(source))
    return HubCheckpoint(source, revision=revision, token=token)


def bare_model(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """Return the model that a checkpoint was saved from, all of it on the meta device.

    Raises:
        BaseLoadError: transformers does not know it.
    """
    code = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.directory, **code)
        named = next(iter(config.architectures or ()), None)
        kind = getattr(transformers, named or "", None)
        with torch.device("meta"), no_init_weights():
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                model = kind(config)
            else:
                model = transformers.AutoModel.from_config(config, **code)
    except (OSError, ValueError) as error:
        raise BaseLoadError(f"{checkpoint.name} cannot be read: {error}") from error
    model.tie_weights()  # type: ignore[operator]
    return model.eval().requires_grad_(False)


class Change(NamedTuple):
    """A tensor that differs."""

    name: str
    before: torch.Tensor | None
    """None where the base has none, or one of another shape."""

    after: torch.Tensor


class Pair:
    """A base and what was made of it by training, in one model's names."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, model: Any):
        """Find every tensor of the model in both.

        Raises:
            BaseLoadError: The tuned one lacks some, or the two share none.
        """
        self.model = model
        self.base = CheckpointBase(model, base)
        self.tuned = CheckpointBase(model, tuned)
        kept = {**dict(model.named_parameters()), **_kept_buffers(model)}
        self.names = [name for name in kept if self._stored(self.tuned, name) is not None]
        """Every tensor once, in the model's order, under the name that the tuned one has it by."""

        lost = [name for name in kept if self._stored(self.tuned, name) is None]
        lost = [f"{name} is not in it" for name in lost if self._stored(self.base, name)]
        lost += [f"{name}: {why}" for name, why in self.tuned.faults.items()]
        shared = [name for name in self.names if self._stored(self.base, name) is not None]
        if not shared:
            lost.append(f"it has no tensor in common with {base.name}")
        if lost:
            kind = type(model).__name__
            raise BaseLoadError(listing(f"{tuned.name} is no whole {kind}", lost))
        self.only_in_base = sorted(
            base.where.keys() - {box.source for t in self.base.tensors.values() for box in t.boxes}
        )
        """Names in the base's files of tensors that the tuned model has no place for."""

    def _stored(self, side: CheckpointBase, name: str) -> str | None:
        """Return the name of a tensor, or of one that is tied to it, by which a side has it."""
        if name in side.tensors:
            return name
        parameter = dict(self.model.named_parameters(remove_duplicate=False)).get(name)
        if parameter is None:
            return None
        return next((tied for tied in side.names(parameter) if tied in side.tensors), None)

    def read_tuned(self, name: str) -> torch.Tensor:
        """Return all of a tensor of the tuned model."""
        found = self.tuned.read(self._stored(self.tuned, name) or name)
        assert found is not None
        return found

    def changes(self) -> Iterator[Change]:
        """Yield what differs, one tensor after another; numbers are compared, whatever the type."""
        for name in self.names:
            stored = self._stored(self.base, name)
            after = self.read_tuned(name)
            before = None if stored is None else self.base.read(stored)
            if before is not None and before.shape != after.shape:
                before = None
            if before is None or not _equal(before, after):
                yield Change(name, before, after)


def _kept_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    held = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in held}


def _equal(before: torch.Tensor, after: torch.Tensor) -> bool:
    if before.dtype == after.dtype:
        return torch.equal(before, after)
    wide = torch.promote_types(before.dtype, after.dtype)
    return torch.equal(before.to(wide), after.to(wide))
