"""What each of several processes keeps and sends in training, for each way to share the work.

Arithmetic on a plan: nothing is run, and no process is asked. N processes send each other data in
rings, so that of S bytes each sends S·(N-1)/N for an all-gather or a reduce-scatter, and twice that
for an all-reduce. What is kept for the backward pass (activations) is no part of it. Where parts
differ in size, the records are of the process with the largest ones.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import nn

from hf_lora.planning.cost_tensor_parallel import fault, tensor_parallel
from hf_lora.planning.cost_tensors import Piece, Pieces, pieces, ring
from hf_lora.planning.records import PerRank, Plan

_MASTER = 4
"""Bytes of each number that DeepSpeed steps a float32 copy of."""


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes of a model that trains, and of parts of it."""

    world: int
    tensors: Pieces
    adam: int
    trained: int
    """How many numbers train."""

    def part(self, size: float) -> int:
        """Return a process's share of what is cut anywhere, as DeepSpeed does."""
        return math.ceil(size / self.world)

    def gather(self, size: float) -> int:
        """Return what a process sends for an all-gather or a reduce-scatter."""
        return ring(size, self.world)

    def rows(self, tensors: Iterable[Piece]) -> int:
        """Return a process's share of what is cut along dimension 0, as FSDP2 does.

        The last processes have fewer rows, or none, but what is sent is as long everywhere.
        """
        return sum(tensor.part(self.world) for tensor in tensors)

    @property
    def base(self) -> int:
        return _total(self.tensors.base)

    @property
    def learning(self) -> int:
        """Bytes of what has gradients, and of these."""
        return _total(self.tensors.learning)

    @property
    def cut(self) -> tuple[Piece, ...]:
        """All that can be cut."""
        return *self.tensors.base, *self.tensors.learning

    @property
    def everything(self) -> int:
        return self.base + self.learning + self.tensors.buffers

    def gathered(self, padded: bool) -> int:
        """Return what is put together at one time: two blocks, and what lies outside of blocks."""
        blocks: dict[str | None, int] = collections.defaultdict(int)
        for each in self.cut:
            blocks[each.block] += each.part(self.world) * self.world if padded else each.bytes
        outside = blocks.pop(None, 0)
        return outside + 2 * max(blocks.values(), default=0)


def per_rank(
    model: nn.Module, plan: Plan, base: Iterable[tuple[str, torch.Tensor]], world: int
) -> tuple[list[PerRank], list[str]]:
    """Return one record for each way to share ``plan`` among ``world`` processes.

    Args:
        model: The model.
        plan: Its plan.
        base: The base's parameters by name; tied ones once.
        world: How many processes, at least 1.

    Returns:
        The records, and a line for each way that is left out, with the reason.
    """
    tensors = pieces(model, plan, base)
    sizes = _Sizes(world, tensors, plan.adam_bytes, plan.parameters)
    found = [_ddp(sizes), _zero2(sizes), _fsdp2(sizes), _zero3(sizes), _offloaded(sizes)]
    reason = fault(model, plan, tensors, world)
    if reason is not None:
        return found, [f"tensor parallelism is left out: {reason}"]
    return [*found, tensor_parallel(model, tensors, world)], []


def _total(tensors: Iterable[Piece]) -> int:
    return sum(tensor.bytes for tensor in tensors)


def _ddp(sizes: _Sizes) -> PerRank:
    return PerRank(
        strategy="DDP",
        weights=sizes.everything,
        gradients=sizes.learning,
        optimizer=sizes.adam,
        sent=2 * sizes.gather(sizes.learning),
        sent_in_full=2 * sizes.gather(sizes.base),
    )


def _zero2(sizes: _Sizes) -> PerRank:
    return PerRank(
        strategy="ZeRO-2",
        weights=sizes.everything,
        gradients=sizes.part(sizes.learning),
        optimizer=sizes.part(sizes.adam + _MASTER * sizes.trained),
        # every process gets all gradients, steps its share, and hands it out
        sent=2 * sizes.gather(sizes.learning) + sizes.gather(sizes.learning),
        sent_in_full=3 * sizes.gather(sizes.base),
    )


def _fsdp2(sizes: _Sizes) -> PerRank:
    learning, others = sizes.rows(sizes.tensors.learning), sizes.world - 1

    def fetched(tensors: Iterable[Piece]) -> int:
        # blocks are put together forward and again back, the rest stays whole from one to the other
        return sum((1 if t.block is None else 2) * t.part(sizes.world) for t in tensors)

    return PerRank(
        strategy="FSDP2",
        weights=sizes.rows(sizes.cut) + sizes.tensors.buffers,
        gathered=sizes.gathered(padded=True),
        gradients=learning,
        optimizer=2 * learning,
        sent=others * (fetched(sizes.cut) + learning),
        sent_in_full=others * (fetched(sizes.tensors.base) + sizes.rows(sizes.tensors.base)),
        sent_to_save=others * learning,
    )


def _zero3(sizes: _Sizes) -> PerRank:
    cut = sizes.base + sizes.learning
    return PerRank(
        strategy="ZeRO-3",
        weights=sizes.part(cut) + sizes.tensors.buffers,
        gathered=sizes.gathered(padded=False),
        gradients=sizes.part(sizes.learning),
        optimizer=sizes.part(sizes.adam + _MASTER * sizes.trained),
        sent=sizes.gather(2 * cut) + sizes.gather(sizes.learning),
        sent_in_full=sizes.gather(3 * sizes.base),
        sent_to_save=sizes.gather(sizes.learning),
    )


def _offloaded(sizes: _Sizes) -> PerRank:
    fsdp = _fsdp2(sizes)
    return dataclasses.replace(
        fsdp,
        strategy="FSDP2, parts on the CPU",
        weights=0,
        gradients=0,
        optimizer=0,
        host=fsdp.weights + fsdp.gradients + fsdp.optimizer,
    )
