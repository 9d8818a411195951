"""What a model's tensor is made of: boxes that stand in tensors of its checkpoint.

transformers puts tensors together and cuts them apart while it loads them. Done with stand-ins that
only know their shape, the same steps tell where each part of a tensor came from.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch

Sizes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Box:
    """A part of a tensor that stands in a checkpoint, axis for axis."""

    source: str
    """The name of a tensor in the checkpoint."""

    begin: Sizes
    """Where the part begins in the tensor that it is a part of."""

    sizes: Sizes
    axes: tuple[int | None, ...]
    """For each axis of that tensor, which axis of the source it is; None for an axis of size 1 that
    the source does not have."""

    offset: Sizes
    """Where the part begins in the source, for each axis of the source."""

    def moved(self, axis: int, by: int) -> Self:
        """Return the same part of a tensor in which it stands further along an axis."""
        begin = (*self.begin[:axis], self.begin[axis] + by, *self.begin[axis + 1 :])
        return dataclasses.replace(self, begin=begin)

    def within(self, axis: int, first: int, last: int) -> Self | None:
        """Return what of it stands between two places of an axis; None if nothing does."""
        low, high = self.begin[axis], self.begin[axis] + self.sizes[axis]
        start, end = max(low, first), min(high, last)
        if start >= end:
            return None
        offset, at = list(self.offset), self.axes[axis]
        if at is not None:
            offset[at] += start - low
        return dataclasses.replace(
            self,
            begin=(*self.begin[:axis], start, *self.begin[axis + 1 :]),
            sizes=(*self.sizes[:axis], end - start, *self.sizes[axis + 1 :]),
            offset=tuple(offset),
        )

    def find(self, index: Sizes) -> Sizes | None:
        """Return where a number of the tensor stands in the source; None if it is not in here."""
        steps = [i - begin for i, begin in zip(index, self.begin, strict=True)]
        if not all(0 <= step < size for step, size in zip(steps, self.sizes, strict=True)):
            return None
        place = list(self.offset)
        for step, axis in zip(steps, self.axes, strict=True):
            if axis is not None:
                place[axis] += step
        return tuple(place)


class Traced:
    """A stand-in for a tensor, for the steps of a conversion: its shape and its boxes."""

    def __init__(self, shape: Sizes, boxes: Sequence[Box]):
        self.shape = torch.Size(shape)
        self.boxes = tuple(boxes)

    @classmethod
    def of(cls, name: str, shape: Sizes) -> "Traced":
        """Return the stand-in for a tensor of the checkpoint."""
        n = len(shape)
        return cls(shape, [Box(name, (0,) * n, shape, tuple(range(n)), (0,) * n)])

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one size."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> "Traced":
        """Return itself: where numbers stand in memory makes no difference."""
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do one of PyTorch's functions."""
        step = _STEPS.get(func)
        if step is None:
            raise NotImplementedError(f"{getattr(func, '__name__', func)} is no step on boxes")
        return step(*args, **(kwargs or {}))


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    boxes = [
        dataclasses.replace(
            box,
            begin=(*box.begin[:dim], i, *box.begin[dim:]),
            sizes=(*box.sizes[:dim], 1, *box.sizes[dim:]),
            axes=(*box.axes[:dim], None, *box.axes[dim:]),
        )
        for i, tensor in enumerate(tensors)
        for box in tensor.boxes
    ]
    first = tensors[0].shape
    if any(tensor.shape != first for tensor in tensors):
        raise ValueError("tensors of different shapes cannot be stacked")
    return Traced((*first[:dim], len(tensors), *first[dim:]), boxes)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim %= tensors[0].ndim
    boxes, reached = [], 0
    for tensor in tensors:
        boxes += [box.moved(dim, reached) for box in tensor.boxes]
        reached += tensor.shape[dim]
    first = tensors[0].shape
    return Traced((*first[:dim], reached, *first[dim + 1 :]), boxes)


def _split(tensor: Traced, sizes: int | Sequence[int], dim: int = 0) -> tuple[Traced, ...]:
    dim %= tensor.ndim
    whole = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - at) for at in range(0, whole, sizes)]
    if sum(sizes) != whole:
        raise ValueError(f"{whole} rows are not {sizes} together")
    found, reached = [], 0
    for size in sizes:
        cut = [box.within(dim, reached, reached + size) for box in tensor.boxes]
        boxes = [box.moved(dim, -reached) for box in cut if box is not None]
        found.append(Traced((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]), boxes))
        reached += size
    return tuple(found)


def _chunk(tensor: Traced, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _transpose(tensor: Traced, dim0: int, dim1: int) -> Traced:
    one, other = dim0 % tensor.ndim, dim1 % tensor.ndim

    def swapped(values: Sequence[Any]) -> tuple[Any, ...]:
        turned = list(values)
        turned[one], turned[other] = turned[other], turned[one]
        return tuple(turned)

    boxes = [
        dataclasses.replace(
            box, begin=swapped(box.begin), sizes=swapped(box.sizes), axes=swapped(box.axes)
        )
        for box in tensor.boxes
    ]
    return Traced(swapped(tensor.shape), boxes)


_STEPS: dict[Any, Any] = {
    torch.stack: _stack,
    torch.cat: _cat,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.transpose: _transpose,
}
