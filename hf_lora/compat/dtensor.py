"""Tensors and models that are spread over several processes (DTensor, FSDP2, ZeRO-3).

A sharded tensor is a DTensor: every process holds a part. DeepSpeed's are in
:mod:`hf_lora.compat.deepspeed`. What is distributed can be asked by one process alone; in all else
every process takes part.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from hf_lora.compat.deepspeed import is_partitioned, pick_from_part, put_together

K = TypeVar("K")


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is a DTensor: parts, or copies, of it on several processes."""
    return hasattr(tensor, "device_mesh")


def is_distributed(tensor: Any) -> bool:
    """Say whether several processes hold a tensor between them, in whatever way."""
    return is_sharded(tensor) or is_partitioned(tensor)


def has_distributed_parameters(model: nn.Module) -> bool:
    """Say whether any parameter of the model is in parts."""
    return any(is_distributed(parameter) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Make FSDP2 put back the parts where it left whole weights after a forward.

    What is written into such a weight is lost, because its parts are what FSDP2 goes on with.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # type: ignore[operator]


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all numbers of a tensor on each process."""
    return gather_full({"": tensor})[""]


def gather_full(tensors: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
    """Return all numbers of some tensors on each process; what ZeRO-3 holds comes in one go."""
    partitioned = [tensor for tensor in tensors.values() if is_partitioned(tensor)]
    if not partitioned:
        return {name: _full(tensor) for name, tensor in tensors.items()}
    with put_together(partitioned):
        return {
            name: tensor.detach().clone() if is_partitioned(tensor) else _full(tensor)
            for name, tensor in tensors.items()
        }


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[operator]


def distribute_like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``value``, which each process has as a whole, spread in the way that ``tensor`` is.

    Nothing is sent: each process cuts its own part out.
    """
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(tensor.device), mesh, placements, src_data_rank=None)


def gather_values(wanted: Sequence[tuple[torch.Tensor, range]]) -> list[torch.Tensor]:
    """Return the numbers at these positions of each flattened tensor, as float32 on the CPU.

    Everything on one device comes in one transfer. Of tensors in parts each process sends only what
    it has of these numbers, for all of them at once; so every process asks for the same.
    """
    heaps: dict[tuple, list[tuple[int, torch.Tensor]]] = {}
    groups: dict[tuple, list[Any]] = {}
    for i, (tensor, at) in enumerate(wanted):
        found, among = _numbers(tensor, at)
        key = (found.device, found.dtype, tuple(id(group) for group in among))
        groups[key] = among  # keeps them, and so their ids, alive
        heaps.setdefault(key, []).append((i, found))
    by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for key, heap in heaps.items():
        numbers = torch.cat([found for _, found in heap]).float()
        for group in groups[key]:
            torch.distributed.all_reduce(numbers, group=group)
        parts = numbers.split([len(found) for _, found in heap])
        by_device.setdefault(key[0], []).extend(
            (i, part) for (i, _), part in zip(heap, parts, strict=True)
        )
    result: dict[int, torch.Tensor] = {}
    for heap in by_device.values():
        numbers = torch.cat([part for _, part in heap]).cpu()
        parts = numbers.split([len(part) for _, part in heap])
        result |= {i: part for (i, _), part in zip(heap, parts, strict=True)}
    return [result[i] for i in range(len(wanted))]


def _numbers(tensor: Any, at: range) -> tuple[torch.Tensor, list[Any]]:
    """Return this process's numbers, zero for the others', and the groups to add them up in."""
    if not is_distributed(tensor) and tensor.is_contiguous():
        return tensor.detach().view(-1)[at.start : at.stop : at.step], []
    positions = torch.arange(at.start, at.stop, at.step)
    if is_partitioned(tensor):
        return pick_from_part(tensor, positions)
    if is_sharded(tensor):
        return _own_part(tensor.detach(), positions)
    where = torch.unravel_index(positions, tensor.shape)
    return tensor.detach()[tuple(index.to(tensor.device) for index in where)], []


def _own_part(tensor: Any, positions: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements
    local = tensor.to_local()
    found = torch.zeros(len(positions), device=local.device)
    here = torch.ones_like(positions, dtype=torch.bool)
    where = []
    for dim, wanted in enumerate(torch.unravel_index(positions, tensor.shape)):
        cut = [_along_first(p) if _cuts(p, dim) else Replicate() for p in placements]
        all_of_them = torch.arange(tensor.shape[dim], device=local.device)
        own = distribute_tensor(all_of_them, mesh, cut, src_data_rank=None).to_local().cpu()
        equal = wanted[:, None] == own[None]
        here &= equal.any(1)
        where.append(equal.int().argmax(1) if own.numel() else torch.zeros_like(wanted))
    indices = tuple(index[here].to(local.device) for index in where)
    found[here.to(local.device)] = local[indices].float()
    cuts = [getattr(placement, "dim", None) is not None for placement in placements]
    return found, [mesh.get_group(i) for i, cut in enumerate(cuts) if cut]


def _cuts(placement: Any, dim: int) -> bool:
    """Say whether a placement cuts this dimension, in one piece or in strides.

    Strides are what FSDP2 leaves of a dimension that tensor parallelism has cut before.
    """
    return getattr(placement, "dim", None) == dim


def _along_first(placement: Any) -> Any:
    """Return the same cut of the only dimension of a vector."""
    from torch.distributed.tensor import Shard

    if placement.is_shard():
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)
