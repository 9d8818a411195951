"""Stand-ins for tensors tell where each number came from: the same steps on numbers agree."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_lora.file_merging.boxes import Traced
from hf_lora.file_merging.pieces import NoRectangleError, as_rows, as_stack, pieces

SHAPES = {"a": (4, 6), "b": (4, 6), "c": (8, 6), "d": (3, 4, 6)}
STEPS: dict[str, Callable[..., Any]] = {
    "stacked": lambda a, b, c, d: torch.stack([a, b], dim=0),
    "stacked, then joined": lambda a, b, c, d: torch.cat(
        [torch.stack([a, b]), torch.stack([b, a])], dim=1
    ),
    "joined": lambda a, b, c, d: torch.cat([a, c, b], dim=0),
    "joined at the end": lambda a, b, c, d: torch.cat([a, b], dim=-1),
    "cut": lambda a, b, c, d: torch.chunk(c, 2, dim=0)[1],
    "cut unequally": lambda a, b, c, d: torch.split(c, [3, 5], dim=0)[1],
    "cut in columns": lambda a, b, c, d: torch.chunk(c, 3, dim=1)[2].contiguous(),
    "turned": lambda a, b, c, d: torch.transpose(d, dim0=1, dim1=2),
    "turned, cut and joined": lambda a, b, c, d: torch.cat(
        [torch.chunk(torch.transpose(c, 0, 1), 2, dim=1)[0], torch.transpose(a, 0, 1)], dim=0
    ),
    "a stack cut": lambda a, b, c, d: torch.chunk(d, 2, dim=1)[1],
}


def numbered() -> dict[str, torch.Tensor]:
    found, first = {}, 0
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(first, first + count).view(shape)
        first += count
    return found


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_each_number_is_found_where_it_came_from(steps: Callable[..., Any]):
    numbers = numbered()
    made = steps(**numbers)
    traced = steps(**{name: Traced.of(name, shape) for name, shape in SHAPES.items()})
    assert traced.shape == made.shape
    for index in itertools.product(*map(range, made.shape)):
        found = [(box.source, box.find(index)) for box in traced.boxes]
        ((source, place),) = [pair for pair in found if pair[1] is not None]
        assert numbers[source][place] == made[index]


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_rows_and_columns_are_where_the_rectangles_say(steps: Callable[..., Any]):
    numbers = numbered()
    made = steps(**numbers)
    traced = steps(**{name: Traced.of(name, shape) for name, shape in SHAPES.items()})
    seen = as_stack(tuple(made.shape))
    matrices = made.view(seen)
    count = 0
    for box in traced.boxes:
        stored = SHAPES[box.source]
        rows = numbers[box.source].view(as_rows(stored, tuple(made.shape), seen))
        for piece in pieces(box, tuple(made.shape), stored, seen):
            part = matrices[piece.matrix, slice(*piece.rows), slice(*piece.columns)]
            there = rows[
                piece.at_row : piece.at_row + piece.height,
                piece.at_column : piece.at_column + piece.width,
            ]
            assert torch.equal(there, part.t() if piece.turned else part)
            count += part.numel()
    assert count == made.numel()


def test_a_part_of_a_kernel_is_no_rectangle():
    traced = torch.chunk(Traced.of("a", (4, 3, 2)), 2, dim=0)[0]
    with pytest.raises(NoRectangleError, match="part of a kernel"):
        list(pieces(traced.boxes[0], (2, 3, 2), (4, 3, 2), (1, 2, 6)))


def test_a_step_that_mixes_numbers_is_not_believed():
    with pytest.raises(NotImplementedError, match="no step on boxes"):
        torch.flip(Traced.of("a", (4, 6)), [0])  # type: ignore[arg-type]
