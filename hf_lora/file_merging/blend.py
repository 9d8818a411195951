"""Merging rows of a stored tensor: one sum in a wide type, to be rounded once.

Legend: N rows of the stored tensor, M its columns, R the ranks of all updates together.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch

from hf_lora.file_merging.pieces import Piece
from hf_lora.file_merging.plan import Entry, Part
from hf_lora.file_merging.updates import Rows, Updates
from hf_lora.functional.low_rank import Product

Factors = tuple[torch.Tensor, torch.Tensor]
"""(N, R) and (R, M)."""


@dataclasses.dataclass(frozen=True)
class _Rectangle:
    """What is done to a rectangle of the stored tensor."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    factors: Factors | None
    """What is added."""

    copies: tuple[tuple[Rows, float], ...]
    """What stands in the place of the base's own, and how much of each."""


class Blend:
    """What one tensor of a merged checkpoint is, row by row.

    Args:
        entry: The tensor.
        updates: What the adapters do.
        wide: Type in which is added up.
    """

    def __init__(self, entry: Entry, updates: Updates, wide: torch.dtype):
        fresh = entry.source is None
        self._rectangles = [_rectangle(part, updates, wide, fresh) for part in entry.parts]

    @torch.no_grad()
    def put_in(self, total_NM: torch.Tensor, first: int) -> None:
        """Turn rows of the base, in the wide type, into those of the sum, in place.

        Args:
            total_NM: The rows.
            first: Which row of the tensor is the first of them.
        """
        for each in self._rectangles:
            low, high = max(each.rows[0], first), min(each.rows[1], first + len(total_NM))
            if low < high:
                block = total_NM[low - first : high - first, slice(*each.columns)]
                begin, end = low - each.rows[0], high - each.rows[0]
                _replace(block, each.copies, begin, end)
                if each.factors is not None:
                    left_NR, right_RM = each.factors
                    block.addmm_(left_NR[begin:end], right_RM)


def _replace(
    block: torch.Tensor, copies: Sequence[tuple[Rows, float]], begin: int, end: int
) -> None:
    """Put copies in the place of the base's own, of which a share may be left."""
    if not copies:
        return
    if len(copies) == 1 and copies[0][1] == 1.0:
        block.copy_(copies[0][0](begin, end))
        return
    left = 1.0 - math.fsum(share for _, share in copies)
    if math.isclose(left, 0.0, abs_tol=1e-6):
        block.zero_()  # of a fresh part it may be anything
    else:
        block.mul_(left)
    for rows, share in copies:
        block.add_(rows(begin, end).to(block.dtype), alpha=share)


def _rectangle(part: Part, updates: Updates, wide: torch.dtype, fresh: bool) -> _Rectangle:
    piece = part.piece
    shares = {u: updates.adapters[u.adapter].weight for u in part.updates if not u.adds}
    total = math.fsum(shares.values()) if fresh else 1.0  # of a fresh part there is no half
    added = [_factors(updates.product(u), piece, wide) for u in part.updates if u.adds]
    copies = [(updates.copied(u, part.seen, piece), shares[u] / total) for u in shares]
    return _Rectangle(
        (piece.at_row, piece.at_row + piece.height),
        (piece.at_column, piece.at_column + piece.width),
        _together(added) if added else None,
        tuple(copies),
    )


def _factors(product: Product, piece: Piece, wide: torch.dtype) -> Factors:
    """Return the factors of a rectangle, as it is stored."""
    left = product.left[piece.matrix, slice(*piece.rows)].to(wide)
    right = product.right[piece.matrix, :, slice(*piece.columns)].to(wide)
    return (right.t(), left.t()) if piece.turned else (left, right)


def _together(factors: Sequence[Factors]) -> Factors:
    """Return the factors of a sum of products."""
    lefts, rights = zip(*factors, strict=True)
    return torch.cat(lefts, 1).contiguous(), torch.cat(rights, 0).contiguous()
