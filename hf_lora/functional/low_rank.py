"""The low-rank update, the one formula of this library: y += s · (x Aᵀ) Bᵀ.

Legend: N rows of input, I input features, O output features, R rank.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Product(NamedTuple):
    """An update as its two factors, in the layout of the tensor that it is added to.

    That tensor is seen as a stack of E matrices of O rows; most are one matrix, E = 1.
    """

    left: torch.Tensor
    """(E, O, R)."""

    right: torch.Tensor
    """(E, R, I)."""


def scaling(r: int, alpha: float, rslora: bool = False) -> float:
    """Return s: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def low_rank(x_NI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, s: float) -> torch.Tensor:
    """Return ``s · (x Aᵀ) Bᵀ``, shape (..., O), in the data type of ``x``.

    The small factors are cast to the input's type, never the input to theirs: a copy of ``x``
    would be kept for the backward pass. The scale is applied where the tensor is smallest.
    """
    h_NR = F.linear(x_NI, a_RI.to(x_NI.dtype))
    return F.linear(h_NR * s, b_OR.to(x_NI.dtype))


def update_norm(a_RI: torch.Tensor, b_OR: torch.Tensor, s: float) -> float:
    """Return the Frobenius norm of ``s · B A`` from the two Gram matrices, without the product.

    ``‖B A‖² = tr((BᵀB)(A Aᵀ))``, in float64.
    """
    a_RI, b_OR = a_RI.detach().double(), b_OR.detach().double()
    squared = ((b_OR.t() @ b_OR) * (a_RI @ a_RI.t())).sum()
    return s * float(squared.clamp_min(0).sqrt())


def product(a_RI: torch.Tensor, b_OR: torch.Tensor, s: float, *, turned: bool = False) -> Product:
    """Return ``s · B A`` in its factors, in float32 (float64 for float64 factors).

    Args:
        a_RI: A.
        b_OR: B.
        s: What the product is multiplied by.
        turned: Whether the tensor is kept as (I, O).
    """
    wide = torch.promote_types(a_RI.dtype, torch.float32)
    a_RI, b_OR = a_RI.to(wide), b_OR.to(wide) * s
    left, right = (a_RI.t(), b_OR.t()) if turned else (b_OR, a_RI)
    return Product(left[None], right[None])


def delta_weight(a_RI: torch.Tensor, b_OR: torch.Tensor, s: float) -> torch.Tensor:
    """Return ``s · B A``, shape (O, I), in float32 (float64 for float64 factors)."""
    wide = torch.promote_types(a_RI.dtype, torch.float32)
    return torch.mm(b_OR.to(wide), a_RI.to(wide)).mul_(s)
