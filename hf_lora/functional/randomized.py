"""The best low-rank product of a large matrix, from a few products with it (randomized SVD).

Halko, Martinsson and Tropp (arXiv 0909.4061): a random space that the matrix has been applied to a
few times holds nearly all of its largest singular vectors.

Legend: E matrices of a stack, O rows, I columns, L size of the random space.
"""

import math

import torch

from hf_lora.functional.low_rank import Product

_MORE = 32
"""How much larger than the rank the space is."""

_CLOSE = 2e-4
"""A round of power iteration that makes the error smaller by less than this share is the last."""

_ROUNDS = 12
"""Most rounds: of a spectrum that does not fall at all no space is much better than another."""

_DENSE = 0.5
"""From this share of the smaller side on, a space is no cheaper than all of the matrix."""


def largest_product(
    matrix: torch.Tensor,
    rank: int | None,
    energy: float | None,
    *,
    generator: torch.Generator,
) -> Product:
    """Return a product near a stack of matrices, (E, O, I), with equally large factors.

    Args:
        matrix: float32 or float64.
        rank: Highest rank; None for any.
        energy: Share of the squared norm that it has to keep; None for all that the rank can.
        generator: What random numbers are drawn from, on the CPU.
    """
    least = min(matrix.shape[1:])
    most = least if rank is None else min(rank, least)
    wanted = most if energy is None else min(most, _MORE)
    norm = _norm(matrix) ** 2
    while True:
        u, values, vh = _decomposed(matrix, wanted, norm, generator)
        count = min(wanted, most)
        if energy is not None:
            kept = values[:, :count].double().square().sum(0).cumsum(0)
            enough = (kept >= energy * norm * (1 - 1e-6)).nonzero()
            count = int(enough[0]) + 1 if len(enough) else count
            if not len(enough) and wanted < most:
                wanted = min(most, 2 * wanted)
                continue
        roots = values[:, :count].sqrt()
        return Product(u[:, :, :count] * roots[:, None], roots[:, :, None] * vh[:, :count])


def _decomposed(
    matrix: torch.Tensor, rank: int, norm: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest singular values and vectors of a stack, whose squared norm is given."""
    size = rank + _MORE
    if size >= _DENSE * min(matrix.shape[1:]):
        return torch.linalg.svd(matrix, full_matrices=False)
    drawn = torch.randn(matrix.shape[2], size, generator=generator, dtype=matrix.dtype)
    space, _ = torch.linalg.qr(matrix @ drawn)
    kept, rounds = 0.0, 0
    while True:
        right, r = torch.linalg.qr(matrix.mT @ space)
        before, kept = kept, float(torch.linalg.svdvals(r)[:, :rank].double().square().sum())
        if rounds == _ROUNDS or kept - before <= 2 * _CLOSE * max(norm - kept, _CLOSE**2 * norm):
            u, values, vh = torch.linalg.svd(r.mT, full_matrices=False)
            return space @ u, values, vh @ right.mT
        space, _ = torch.linalg.qr(matrix @ right)
        rounds += 1


def distance(matrix: torch.Tensor, product: Product) -> tuple[float, float]:
    """Return the norm of a stack, and of what a product lacks of it; the stack is written over."""
    norm = _norm(matrix)
    matrix.baddbmm_(product.left.to(matrix.dtype), product.right.to(matrix.dtype), alpha=-1)
    lost = _norm(matrix)
    return norm, lost if math.isfinite(lost) else math.inf


def _norm(matrix: torch.Tensor) -> float:
    """Return the norm of a stack, row by row: a sum in float64 of all would make a copy of it."""
    return float(torch.linalg.vector_norm(matrix, dim=-1).double().norm())
