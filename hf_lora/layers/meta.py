"""Adapters on layers whose weights come later: on the meta device, until ``to_empty`` and a load.

``to_empty`` gives every tensor of a model new memory and leaves in it whatever is there. That is
right for weights that are loaded next; an adapter has its values already, or must be drawn.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_lora.compat.dtensor import distribute_like, is_sharded
from hf_lora.compat.torch_modules import is_to_empty

if TYPE_CHECKING:
    from hf_lora.layers.kind import Patched


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is known of a module's tensors before they are moved, or given new memory."""

    empty: set[str]
    """The names of all that have no data."""

    values: dict[str, torch.Tensor]
    """What the added ones hold that have data."""

    emptying: bool
    """Whether it is ``to_empty`` that asks, which also takes the data of those that have some."""


def keep_values(module: "Patched", fn: Callable[..., Any]) -> Kept | None:
    """Return what must be known to undo the harm that ``fn`` may do, or None if it does none.

    Args:
        module: One of ours.
        fn: What will be applied to each of its tensors.
    """
    tensors = _tensors(module)
    empty = {name for name, tensor in tensors.items() if tensor.is_meta}
    emptying = is_to_empty(fn)
    if not empty and not emptying:
        return None
    added = module.lora_added()
    values = {n: t.detach().clone() for n, t in tensors.items() if n in added and n not in empty}
    return Kept(empty, values, emptying)


@torch.no_grad()
def refill(module: "Patched", kept: Kept | None) -> None:
    """Put the values of added tensors back if all were given new memory; draw what has none."""
    if kept is None:
        return
    tensors = _tensors(module)
    there = {name for name, tensor in tensors.items() if not tensor.is_meta}
    if kept.emptying or kept.empty & there:
        for name in kept.values.keys() & there:
            tensors[name].copy_(kept.values[name])
        module.lora_draw(module.lora_added() & kept.empty & there)


def set_full(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give ``tensor`` the numbers that this process has for all of it, cut if it is sharded.

    Processes may have drawn different numbers: where they hold copies, the first one's count, and
    then every process takes part.
    """
    tensor.copy_(distribute_like(value.to(tensor.device, tensor.dtype), tensor))
    if is_sharded(tensor):
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        for dim, placement in enumerate(placements):
            if placement.is_replicate():
                local = tensor.to_local()  # type: ignore[operator]
                torch.distributed.broadcast(local, group=mesh.get_group(dim), group_src=0)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None
    }
