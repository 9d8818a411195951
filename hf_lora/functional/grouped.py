"""Products with one matrix for each group of rows, as experts have, and low-rank ones on top.

A mixture of experts sends each token to a few of its experts. The rows are sorted by expert, so
that each expert's stand together, and are multiplied by that expert's matrix alone.

Legend: N tokens, K experts for each token, S = N·K routed rows, E experts, I input and O output
features, R rank.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hf_lora.functional.low_rank import Product
from hf_lora.functional.packed import Stack

_KERNEL_BYTES = 16
"""What the grouped kernel wants the rows' strides to be a multiple of."""

_RANKS = 8
"""What ranks are padded to a multiple of for it."""


class Routed:
    """Which rows go to which expert."""

    def __init__(self, experts_NK: torch.Tensor, number: int):
        flat = experts_NK.reshape(-1)
        self.each = experts_NK.shape[-1]
        """K."""

        by_expert, self.order = torch.sort(flat, stable=True)
        """Of the S sorted rows, the places that they have unsorted."""

        self.expert = by_expert
        """The expert of each sorted row."""

        self.token = self.order // self.each
        """The token of each sorted row."""

        # neither bincount nor unique: on a GPU they wait for its numbers
        counted = torch.arange(number, device=flat.device)
        self.ends = torch.searchsorted(by_expert, counted, right=True).int()
        """Where each expert's rows end, (E,)."""

    @functools.cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Of each expert that has rows: its number, its first row and the one after its last."""
        ends = self.ends.tolist()
        starts = [0, *ends[:-1]]
        return [(e, a, z) for e, (a, z) in enumerate(zip(starts, ends, strict=True)) if z > a]

    @functools.cached_property
    def _back(self) -> torch.Tensor:
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(self.order), device=back.device)
        return back

    def sum_by_token(self, rows_SO: torch.Tensor) -> torch.Tensor:
        """Return the sum of each token's rows, (N, O), always in the same order."""
        return rows_SO[self._back].view(-1, self.each, rows_SO.shape[-1]).sum(1)

    def unsorted(self, values_S: torch.Tensor) -> torch.Tensor:
        """Return a number for each row as (N, K)."""
        return values_S[self._back].view(-1, self.each)


def grouped_product(
    x_SI: torch.Tensor, w_EIO: Stack, routed: Routed, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """Return each row times its expert's matrix, (S, O).

    Packed matrices are unpacked one by one, and those without rows not at all.

    Args:
        x_SI: Rows, sorted by expert.
        w_EIO: A matrix for each expert, of the same type.
        routed: Which rows are whose.
        onto: What to add it to, in place.
    """
    if isinstance(w_EIO, torch.Tensor) and _has_kernel(x_SI, w_EIO):
        y_SO = F.grouped_mm(x_SI, w_EIO, offs=routed.ends)
        return y_SO if onto is None else onto.add_(y_SO)
    if onto is None:
        y_SO = x_SI.new_empty(len(x_SI), w_EIO.shape[-1])
        for e, a, z in routed.spans:
            torch.mm(x_SI[a:z], w_EIO[e], out=y_SO[a:z])
        return y_SO
    for e, a, z in routed.spans:
        onto[a:z].addmm_(x_SI[a:z], w_EIO[e])
    return onto


def grouped_outer(x_SI: torch.Tensor, y_SO: torch.Tensor, routed: Routed) -> torch.Tensor:
    """Return ``xᵀ y`` of each expert's rows, (E, I, O); zeros for those without rows."""
    if _has_kernel(x_SI.t(), y_SO):
        return F.grouped_mm(x_SI.t(), y_SO, offs=routed.ends)
    out_EIO = x_SI.new_zeros(len(routed.ends), x_SI.shape[-1], y_SO.shape[-1])
    for e, a, z in routed.spans:
        torch.mm(x_SI[a:z].t(), y_SO[a:z], out=out_EIO[e])
    return out_EIO


def _has_kernel(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Say whether PyTorch's grouped kernel takes these."""
    if left.dtype != torch.bfloat16 or right.dtype != left.dtype:
        return False
    return _kernel_runs_on(left.device) and all(map(_is_aligned, (left, right)))


def _kernel_runs_on(device: torch.device) -> bool:
    if device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _is_aligned(tensor: torch.Tensor) -> bool:
    strides = tensor.stride()[-2:]
    wide = max(strides) * tensor.element_size()
    return 1 in strides and wide % _KERNEL_BYTES == 0 and tensor.data_ptr() % _KERNEL_BYTES == 0


class Factors(NamedTuple):
    """One adapter's factors for a stack of E matrices, as PEFT keeps them."""

    a: torch.Tensor
    """(E·R, I): an expert's rows stand together."""

    b: torch.Tensor
    """(O, R·E): the experts' columns of one rank stand together."""

    r: int
    s: float
    """What the product is multiplied by."""

    swapped: bool = False
    """Whether A is as wide as the output and B as the input, as PEFT has it for some classes."""

    def reading(self) -> torch.Tensor:
        """Return what rows are multiplied with first, (E, R, I), a view."""
        return stack_b(self.b, self.r) if self.swapped else stack_a(self.a, self.r)

    def giving(self) -> torch.Tensor:
        """Return what that is multiplied with, (E, R, O), a view."""
        return stack_a(self.a, self.r) if self.swapped else stack_b(self.b, self.r)


def stack_a(a: torch.Tensor, r: int) -> torch.Tensor:
    """Return A as (E, R, I), a view."""
    return a.view(-1, r, a.shape[-1])


def stack_b(b: torch.Tensor, r: int) -> torch.Tensor:
    """Return B as (E, R, O), a view."""
    return b.view(len(b), r, -1).permute(2, 1, 0)


def stacked(updates: Sequence[Factors], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of the sum of several updates: A (E, R, I) and s·B (E, R, O)."""
    a_ERI = torch.cat([each.reading().to(dtype) for each in updates], 1)
    b_ERO = torch.cat([(each.giving() * each.s).to(dtype) for each in updates], 1)
    missing = -a_ERI.shape[1] % _RANKS
    if missing and _kernel_runs_on(a_ERI.device):
        a_ERI, b_ERO = (F.pad(each, (0, 0, 0, missing)) for each in (a_ERI, b_ERO))
    return a_ERI.contiguous(), b_ERO.contiguous()


def apart(
    updates: Sequence[Factors], da_ERI: torch.Tensor, db_ERO: torch.Tensor
) -> list[torch.Tensor]:
    """Return the gradients of the factors of several updates, from those of :func:`stacked`."""
    found, at = [], 0
    for each in updates:
        da, db = da_ERI[:, at : at + each.r], db_ERO[:, at : at + each.r]
        db = db.to(torch.promote_types(db.dtype, each.b.dtype)) * each.s
        da, db = (db, da) if each.swapped else (da, db)
        found.append(da.reshape(each.a.shape).to(each.a.dtype))
        found.append(db.permute(2, 1, 0).reshape(each.b.shape).to(each.b.dtype))
        at += each.r
    return found


def stack_product(update: Factors, *, turned: bool) -> Product:
    """Return ``s · B A`` of every expert in its factors, in float32 or wider.

    Args:
        update: Factors that are kept as A and B say.
        turned: Whether the stack is kept as (E, I, O), and not as (E, O, I).
    """
    wide = torch.promote_types(update.a.dtype, torch.float32)
    a_ERI = stack_a(update.a.detach(), update.r).to(wide)
    b_ERO = stack_b(update.b.detach(), update.r).to(wide) * update.s
    left, right = (a_ERI, b_ERO) if turned else (b_ERO, a_ERI)
    return Product(left.transpose(1, 2), right)


def stack_norm(update: Factors) -> float:
    """Return the Frobenius norm of ``s · B A`` over all experts, from the Gram matrices."""
    a_ERI = stack_a(update.a.detach(), update.r).double()
    b_ERO = stack_b(update.b.detach(), update.r).double()
    squared = (b_ERO @ b_ERO.transpose(1, 2)) * (a_ERI @ a_ERI.transpose(1, 2))
    return update.s * float(squared.sum().clamp_min(0).sqrt())
