"""The low-rank update, the one formula of this library: y += s · (x Aᵀ) Bᵀ.

Legend: N rows of input, I input features, O output features, R rank.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

_BLOCK = 1 << 17
"""Numbers of a sum that a core's cache has room for beside what they are made of. On an EPYC with
1 MiB of it, blocks of 32, 64, 128 and 256 thousand took 1.47, 1.22, 1.07 and 1.00 of the last."""

_BLOCK_ELSEWHERE = 1 << 24
"""The same where starting a product takes longer, and a whole sum would be twice the weight."""


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


def dense(update: Product) -> torch.Tensor:
    """Return an update as what it stands for: (O, I) of one matrix, (E, O, I) of several."""
    return update.left[0] @ update.right[0] if len(update.left) == 1 else update.left @ update.right


def plus_products(weight: torch.Tensor, products: Sequence[Product]) -> torch.Tensor:
    """Return a tensor plus updates: one sum in float32 or wider, rounded once to its type.

    Computed in blocks of rows, so that neither an update nor the sum is ever there as a whole: a
    block is summed up and rounded while a core's cache has it. Where gradients are recorded it is
    one step.

    Args:
        weight: A tensor.
        products: Updates of it, in any place and of any type.
    """
    merged = torch.empty_like(weight)
    if not products or not weight.numel():
        return merged.copy_(weight)
    types = (weight.dtype, *(product.left.dtype for product in products))
    wide = functools.reduce(torch.promote_types, types, torch.float32)
    left_EOR = torch.cat([p.left.to(weight.device, wide) for p in products], dim=2)
    right_ERI = torch.cat([p.right.to(weight.device, wide) for p in products], dim=1)
    if torch.is_grad_enabled():
        old_EOI = weight.to(wide).reshape(len(left_EOR), -1, right_ERI.shape[2])
        new_EOI = torch.stack([*map(torch.addmm, old_EOI, left_EOR, right_ERI)])
        return new_EOI.view(weight.shape).to(weight.dtype)
    number, outs, ins = len(left_EOR), left_EOR.shape[1], right_ERI.shape[2]
    most = _BLOCK if weight.device.type == "cpu" else _BLOCK_ELSEWHERE
    rows = max(1, min(outs, most // ins))
    block_OI = torch.empty(rows, ins, dtype=wide, device=weight.device)
    old_EOI = weight.reshape(number, outs, ins)  # a copy where it does not stand row by row
    new_EOI = merged.view_as(old_EOI) if merged.is_contiguous() else torch.empty_like(old_EOI)
    for e in range(number):
        for at in range(0, outs, rows):
            here = slice(at, at + rows)
            total_OI = block_OI[: len(old_EOI[e, here])].copy_(old_EOI[e, here])
            new_EOI[e, here] = total_OI.addmm_(left_EOR[e, here], right_ERI[e])
    return merged if merged.is_contiguous() else merged.copy_(new_EOI.view(weight.shape))


def surely_fits(weight: torch.Tensor, products: Sequence[Product]) -> bool:
    """Say whether the sum of a tensor and updates is finite in its type, by a bound alone.

    ``|(B A)ij| <= |B i| |A j|``, with the norms of a row and of a column.
    """
    if not weight.numel():
        return True
    low, high = torch.stack(weight.detach().aminmax()).tolist()
    most = max(-low, high)
    for left, right in products:
        rows_EO, columns_EI = left.detach().norm(dim=2), right.detach().norm(dim=1)
        most += float((rows_EO.amax(1) * columns_EI.amax(1).to(rows_EO)).amax())
    # False for nan, too; a hundredth for what rounding may add
    return most <= 0.99 * torch.finfo(weight.dtype).max
