"""Parameters that DeepSpeed's ZeRO-3 has cut into flat parts, one for each process.

Such a parameter is an ``nn.Parameter`` still, but outside of its layer's forward and backward it is
empty: its size is in ``ds_shape``, and this process's part in ``ds_tensor``. Numbers can be read
only if every process takes part.
"""

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch


def is_partitioned(tensor: Any) -> bool:
    """Say whether ZeRO-3 holds a tensor in parts, be it put together at this moment or not."""
    return hasattr(tensor, "ds_id")


def is_engine(value: Any) -> bool:
    """Say whether an object is what DeepSpeed puts around a model."""
    return any(cls.__name__ == "DeepSpeedEngine" for cls in type(value).__mro__)


def have_engine(tensors: Iterable[Any]) -> bool:
    """Say whether an optimizer of DeepSpeed's steps any of the tensors, on copies of its own."""
    return "deepspeed" in sys.modules and any(
        hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping") for tensor in tensors
    )


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape that a tensor has when all of it is there."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def numel_of(tensor: torch.Tensor) -> int:
    """Return how many numbers a tensor has when all of it is there."""
    return math.prod(shape_of(tensor))


@contextlib.contextmanager
def put_together(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have all of some partitioned tensors on every process inside the ``with`` block."""
    with sys.modules["deepspeed"].zero.GatheredParameters(list(tensors)):
        yield


def pick_from_part(tensor: Any, positions: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
    """Return this process's numbers of those at these positions, and the groups to add them up in.

    The others' are zero. A part that is not here (on a disk) or not in ordinary numbers is left to
    DeepSpeed to put together.
    """
    part = tensor.ds_tensor
    if part.numel() != part.ds_numel or not part.is_floating_point():
        with put_together([tensor]):
            return tensor.detach().reshape(-1)[positions.to(tensor.device)].float(), []
    first = tensor.ds_zero_partition_rank * part.ds_numel
    here = (positions >= first) & (positions < first + part.ds_numel)
    found = torch.zeros(len(positions))
    found[here] = part[(positions[here] - first).to(part.device)].to("cpu", torch.float32)
    device = sys.modules["deepspeed"].accelerator.get_accelerator().current_device_name()
    return found.to(device), [tensor.ds_process_group]
