"""Stacks of matrices in 4 bits: each expert's packed by itself, so that one is unpacked alone.

Legend: E experts, O output and I input features of the matrix as it is kept, L bytes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_lora.compat import bitsandbytes

SCALE = torch.float32
"""The type of each block's scale, which stands behind the expert's numbers in the same bytes."""


class Packing(NamedTuple):
    """How matrices are packed."""

    shape: tuple[int, int]
    """(O, I) of each."""

    dtype: torch.dtype
    """What they are unpacked to: their own type before."""

    kind: str
    """``"nf4"`` or ``"fp4"``."""

    block: int
    """How many numbers have one scale."""

    @property
    def numbers(self) -> int:
        """How many a matrix has."""
        return self.shape[0] * self.shape[1]

    @property
    def packed(self) -> int:
        """Bytes of the numbers alone, padded so that scales begin where floats can."""
        return -(-self.numbers // 2 // SCALE.itemsize) * SCALE.itemsize

    @property
    def width(self) -> int:
        """L, the bytes of one matrix."""
        return self.packed + -(-self.numbers // self.block) * SCALE.itemsize


class PackedStack(nn.Parameter):
    """A stack as bytes, (E, L): those of a matrix, and behind them its blocks' scales.

    One tensor of bytes: ``.to(dtype)`` would round scales that were tensors of their own.
    """

    packing: Packing

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedStack":
        if id(self) not in memo:
            memo[id(self)] = as_packed(self.data.clone(), self.packing)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return as_packed, (self.data, self.packing)

    @property
    def full_shape(self) -> tuple[int, int, int]:
        """(E, O, I) of the numbers that it stands for."""
        return (len(self), *self.packing.shape)

    def matrix(self, e: int) -> torch.Tensor:
        """Return the numbers of one expert, (O, I)."""
        own, packing = self.data[e], self.packing
        scales = own[packing.packed :].view(SCALE)
        numbers = own[: -(-packing.numbers // 2)]
        return bitsandbytes.unpack(numbers, scales, *packing)

    def numbers_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the numbers at these positions of the flattened stack, unpacking no other."""
        packing = self.packing
        expert, at = positions // packing.numbers, positions % packing.numbers
        pairs = self.data[expert, at // 2].int()
        codes = torch.where(at % 2 == 0, pairs >> 4, pairs & 15)
        first = packing.packed + at // packing.block * SCALE.itemsize
        places = first[:, None] + torch.arange(SCALE.itemsize, device=at.device)
        scales = self.data[expert[:, None], places].contiguous().view(SCALE)[:, 0]
        return bitsandbytes.codes(packing.kind, self.device)[codes] * scales


def as_packed(data: torch.Tensor, packing: Packing) -> PackedStack:
    """Return a parameter of bytes that never trains."""
    made = torch.Tensor._make_subclass(PackedStack, data, False)
    made.packing = packing
    return made


def pack(stack: torch.Tensor, kind: str, block: int) -> PackedStack:
    """Return a stack (E, O, I) in 4 bits, packed expert by expert.

    No more is made besides than the packed stack and what one expert takes.
    """
    packing = Packing(tuple(stack.shape[1:]), stack.dtype, kind, block)  # type: ignore[arg-type]
    data = torch.zeros(len(stack), packing.width, dtype=torch.uint8, device=stack.device)
    for own, matrix in zip(data, stack.detach(), strict=True):
        pack_matrix(matrix, packing, own)
    return as_packed(data, packing)


def pack_matrix(matrix: torch.Tensor, packing: Packing, into: torch.Tensor) -> None:
    """Write one expert's matrix (O, I) as bytes (L,)."""
    numbers, scales = bitsandbytes.pack(matrix, packing.kind, packing.block)
    into.zero_()
    into[: len(numbers)] = numbers
    into[packing.packed :] = scales.to(SCALE).view(torch.uint8)


def unpack(stack: PackedStack) -> torch.Tensor:
    """Return all numbers of a stack, (E, O, I)."""
    made = stack.data.new_empty(stack.full_shape, dtype=stack.packing.dtype)
    for e in range(len(stack)):
        made[e] = stack.matrix(e)
    return made


class Slices:
    """A packed stack as products take it: as if it were (E, I, O), one matrix at a time."""

    requires_grad = False

    def __init__(self, stack: PackedStack, *, turned: bool):
        self._stack = stack
        self._turned = turned
        """Whether matrices are turned around when they are read."""

        one, other = stack.packing.shape
        self.shape = (len(stack), *((other, one) if turned else (one, other)))
        self.dtype, self.device = stack.packing.dtype, stack.device

    def __len__(self) -> int:
        return len(self._stack)

    def __getitem__(self, e: int) -> torch.Tensor:
        matrix = self._stack.matrix(e)
        return matrix.t() if self._turned else matrix

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[e] for e in range(len(self)))

    def transpose(self, one: int, other: int) -> "Slices":
        """Return the same with each matrix turned around."""
        assert {one, other} == {1, 2}
        return Slices(self._stack, turned=not self._turned)


Stack = torch.Tensor | Slices
"""(E, I, O): what the rows of each expert are multiplied with."""


def times(x: torch.Tensor, w: Stack, e: int) -> torch.Tensor:
    """Return rows times one expert's matrix; of a packed one nothing is kept for the backward."""
    return _Times.apply(x, w, e) if isinstance(w, Slices) else x @ w[e]


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: Slices, e: int) -> torch.Tensor:
        ctx.w, ctx.e = w, e
        return x @ w[e]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return dy @ ctx.w[ctx.e].t(), None, None
