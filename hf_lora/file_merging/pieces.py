"""Where a part of a model's tensor stands in the rows and columns of a checkpoint's tensor."""

import dataclasses
import math
from collections.abc import Iterator

from hf_lora.file_merging.boxes import Box, Sizes

Stack = tuple[int, int, int]
"""How many matrices there are, and how many rows and columns each has."""


class NoRectangleError(ValueError):
    """A part of a tensor is no rectangle of rows and columns where it is stored."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of one matrix of a model's tensor, and where that stands in the checkpoint's.

    The checkpoint's tensor is seen as rows of its last axis; what has more axes than two is a
    stack of matrices one below the other.
    """

    matrix: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    at_row: int
    at_column: int
    turned: bool = False
    """Whether the checkpoint has the matrix transposed."""

    @property
    def height(self) -> int:
        """How many of the checkpoint's rows it takes."""
        first, last = self.columns if self.turned else self.rows
        return last - first

    @property
    def width(self) -> int:
        """How many of the checkpoint's columns it takes."""
        first, last = self.rows if self.turned else self.columns
        return last - first


def as_rows(
    stored: Sizes, shape: Sizes | None = None, seen: Stack | None = None
) -> tuple[int, int]:
    """Return how many rows and columns a stored tensor is seen as.

    Args:
        stored: Its own shape.
        shape: That of the model's tensor which it is, or is a part of.
        seen: As which stack of matrices that one is seen.
    """
    if shape is not None and seen is not None and is_kernel(shape, seen):
        return seen[1], seen[2]
    if len(stored) < 2:
        return 1, math.prod(stored)
    if len(stored) > 3:
        return stored[0], math.prod(stored[1:])
    return math.prod(stored[:-1]), stored[-1]


def is_kernel(shape: Sizes, seen: Stack) -> bool:
    """Say whether a tensor is a convolution's, whose last axes are seen as one."""
    return len(shape) > 3 or (len(shape) == 3 and seen != as_stack(shape))


def as_stack(shape: Sizes) -> Stack:
    """Return as which stack a tensor is seen that is replaced."""
    if len(shape) > 3:
        return 1, shape[0], math.prod(shape[1:])
    one, two, three = (*(1,) * (3 - len(shape)), *shape)
    return one, two, three


def pieces(box: Box, shape: Sizes, stored: Sizes, seen: Stack) -> Iterator[Piece]:
    """Yield the rectangles of a box.

    Args:
        box: A part of a model's tensor.
        shape: The shape of that tensor.
        stored: The shape of the checkpoint's tensor that the box stands in.
        seen: As which stack the model's tensor is seen.

    Raises:
        NoRectangleError: It is none.
    """
    kernel = is_kernel(shape, seen)
    whole = box.sizes == shape == stored and box.axes == tuple(range(len(shape)))
    if kernel and not whole:
        raise NoRectangleError(f"{box.source} is a part of a kernel")
    if kernel or (whole and len(shape) != 3):
        yield Piece(0, (0, seen[1]), (0, seen[2]), 0, 0)
        return
    fill = 3 - len(shape)
    begin, sizes = (*(0,) * fill, *box.begin), (*(1,) * fill, *box.sizes)
    stack, row, column = (*(None,) * fill, *box.axes)
    last = len(stored) - 1
    turned = (row, column) == (last, last - 1)
    straight = (row, column) == (last - 1, last) or (row is None and column == last == 0)
    if not (turned or straight) or stack != (0 if last == 2 else None):
        raise NoRectangleError(f"the axes of {box.source} are others in the model")
    one, other = (column, row) if turned else (row, column)
    first_row = 0 if one is None else box.offset[one]
    for i in range(sizes[0]):
        above = 0 if stack is None else (box.offset[stack] + i) * stored[-2]
        yield Piece(
            begin[0] + i,
            (begin[1], begin[1] + sizes[1]),
            (begin[2], begin[2] + sizes[2]),
            above + first_row,
            0 if other is None else box.offset[other],
            turned,
        )
