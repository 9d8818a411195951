"""The arithmetic of base layers and their low-rank updates, forward and back, on plain tensors.

``y = x Wᵀ + bias + Σ s · (x Aᵀ) Bᵀ`` for all layers that read the same ``x``. The six small
products of an update (two forward, four back) are added in place into what the base's two large
ones gave; the A's of all layers are one matrix, so that ``x`` is read once for all of them.
Formulas: arXiv 2106.09685, differentiated by hand.

Legend: N rows of input, I input features, O output features, R rank, Q ranks of several updates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from hf_lora.functional.dropout import keep_mask, masked, unpacked
from hf_lora.functional.scaled_rows import ScaledRows
from hf_lora.functional.spec import Factors, OptionalTensors, Spec, Tensors


class SavedForBackward(NamedTuple):
    """What the updates with dropout saw, for the backward pass."""

    masks: Tensors
    """Which elements of x were kept; see :func:`hf_lora.functional.dropout.keep_mask`."""

    h: Tensors
    """s · x Aᵀ, (N, R), of what was kept of x."""

    h_NQ: torch.Tensor | None = None
    """The same of the updates that saw all of x, where somebody may write x in between."""


def forward_pass(
    spec: Spec,
    x: torch.Tensor,
    bases: Tensors,
    weights: OptionalTensors,
    biases: OptionalTensors,
    factors: Factors,
) -> tuple[list[torch.Tensor], SavedForBackward]:
    """Return each layer's output, (..., O).

    Args:
        spec: What to do.
        x: Shape (..., I).
        bases: Each layer's own output where it computed that itself; else not looked at.
        weights: Each layer's weight, (O, I), in the spec's type, or None.
        biases: Each layer's bias or None.
        factors: The updates' factors.
    """
    x_NI = spec.rows(x)
    h: dict[int, torch.Tensor] = {}
    h_NQ = None
    if factors.a_QI is not None:
        h_NQ = torch.mm(x_NI.to(spec.update_dtype), factors.a_QI.t())
        h.update(zip(spec.together, spec.parts(h_NQ, spec.together, 1), strict=True))
    masks = []
    rows, features = x_NI.shape
    left_NI = torch.empty_like(x_NI) if spec.apart else x_NI
    for i, a_RI in zip(spec.apart, factors.a, strict=True):
        mask = keep_mask(rows, features, spec.updates[i].dropout, x.device)
        masked(x_NI, unpacked(mask, features), out=left_NI)
        h[i] = torch.mm(left_NI.to(spec.update_dtype), a_RI.t())
        masks.append(mask)
    outputs = []
    leading = x.shape[:-1]
    for base, weight_OI, bias, numbers in zip(bases, weights, biases, spec.numbers, strict=True):
        out = base.shape[-1] if weight_OI is None else weight_OI.shape[0]
        # whole from the first: a view made in here could not be edited in place, as others' can
        y = x.new_empty((*leading, out), dtype=spec.dtype)
        y_NO = y.view(rows, out)
        if weight_OI is None:
            y_NO.copy_(spec.rows(base))
        elif bias is None:
            torch.mm(x_NI, weight_OI.t(), out=y_NO)
        else:
            torch.addmm(bias.to(spec.dtype), x_NI, weight_OI.t(), out=y_NO)
        _add_products(y_NO, [(h[i], factors.b[i].t()) for i in numbers])
        outputs.append(y)
    # what is kept for each row is kept in the type that is computed in
    return outputs, SavedForBackward(masks, [h[i].to(spec.dtype) for i in spec.apart], h_NQ)


def _add_products(total: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Add products of matrices in place; those of a wider type than the sum's are rounded once."""
    if pairs[0][0].dtype == total.dtype:
        for left, right in pairs:
            total.addmm_(left, right)
        return
    wide = torch.mm(*pairs[0])
    for left, right in pairs[1:]:
        wide.addmm_(left, right)
    total.add_(wide)


class Gradients(NamedTuple):
    """What a backward pass gives; None for what nobody wants, or what no gradient came from."""

    x_NI: torch.Tensor | None
    a: OptionalTensors
    b: OptionalTensors


def backward_pass(
    spec: Spec,
    dys: OptionalTensors,
    weights: OptionalTensors,
    factors: Factors,
    seen: SavedForBackward,
    input_rows: Callable[[], ScaledRows],
    wanted: tuple[bool, Sequence[bool], Sequence[bool]],
) -> Gradients:
    """Return the gradients of x, of the A's and of the B's.

    Args:
        spec: What the forward pass did.
        dys: The gradient of each layer's output, or None.
        weights: Each layer's weight, or None where its own output was given.
        factors: The factors that the forward pass had.
        seen: What it returned.
        input_rows: Returns x; called once, if at all.
        wanted: Whether the gradients of x, of each A, and of each B are wanted.
    """
    x_wanted, a_wanted, b_wanted = wanted
    together, a_QI = _live(spec, dys, factors.a_QI)
    x = input_rows() if any(a_wanted) or any(b_wanted) else None
    h = {i: kept.to(spec.update_dtype) for i, kept in zip(spec.apart, seen.h, strict=True)}
    if x is not None and a_QI is not None and any(b_wanted[i] for i in together):
        if seen.h_NQ is not None:
            h.update(zip(spec.together, spec.parts(seen.h_NQ, spec.together, 1), strict=True))
        else:
            h.update(zip(together, spec.parts(x.times(a_QI), together, 1), strict=True))
    dh, db = _through_b(spec, dys, factors.b, h, b_wanted)
    dx = _Sum()
    da = _through_masks(spec, dh, factors, seen, x, dx if x_wanted else None, a_wanted)
    if x_wanted:
        for dy, weight_OI in zip(dys, weights, strict=True):
            if dy is not None and weight_OI is not None:
                dx.add_product(spec.rows(dy), weight_OI)
    if a_QI is not None:
        parts = [dh[i] for i in together]
        dh_NQ = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if x_wanted:
            dx.add_product(dh_NQ, a_QI)
        if x is not None and any(a_wanted):
            da |= _unstacked(spec, x.under(dh_NQ), together)
    numbers = range(len(spec.updates))
    return Gradients(
        None if dx.total is None else dx.total.to(spec.dtype),
        [da.get(i) if a_wanted[i] else None for i in numbers],
        [db.get(i) for i in numbers],
    )


class _Sum:
    """A sum that is computed in the memory of its first term."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def add(self, term: torch.Tensor) -> None:
        """Add a tensor, which may become the sum itself."""
        self.total = term if self.total is None else self.total.add_(term)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the product of two matrices."""
        if self.total is None:
            self.total = torch.mm(left, right)
        else:
            _add_products(self.total, [(left, right)])


def _through_b(
    spec: Spec,
    dys: OptionalTensors,
    b: Tensors,
    h: Mapping[int, torch.Tensor],
    wanted: Sequence[bool],
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Return dh and dB of each update that a gradient comes to."""
    dh: dict[int, torch.Tensor] = {}
    db: dict[int, torch.Tensor] = {}
    for dy, numbers in zip(dys, spec.numbers, strict=True):
        if dy is None:
            continue
        dy_NO = spec.rows(dy).to(spec.update_dtype)
        for i in numbers:
            dh[i] = torch.mm(dy_NO, b[i])
            if wanted[i]:
                # the narrow factor first: its product is faster, and the result is small
                db_OR = torch.mm(h[i].t(), dy_NO).t()
                db[i] = db_OR.to(spec.updates[i].dtype, memory_format=torch.contiguous_format)
    return dh, db


def _through_masks(
    spec: Spec,
    dh: Mapping[int, torch.Tensor],
    factors: Factors,
    seen: SavedForBackward,
    x: ScaledRows | None,
    dx: _Sum | None,
    wanted: Sequence[bool],
) -> dict[int, torch.Tensor]:
    """Add to dx what the updates with dropout give, and return each dA that is wanted."""
    da: dict[int, torch.Tensor] = {}
    left_NI = None if x is None or not spec.apart else torch.empty_like(x.core_NI)
    for i, mask, a_RI in zip(spec.apart, seen.masks, factors.a, strict=True):
        if i not in dh:
            continue
        keep = unpacked(mask, a_RI.shape[1])
        if wanted[i] and x is not None and left_NI is not None:
            left = x._replace(core_NI=masked(x.core_NI, keep, out=left_NI))
            da[i] = left.under(dh[i]).to(spec.updates[i].dtype).mul_(spec.strengths[i])
        if dx is not None:
            part_NI = torch.mm(dh[i], a_RI)
            dx.add(masked(part_NI, keep, out=part_NI))
    return da


def _live(
    spec: Spec, dys: OptionalTensors, a_QI: torch.Tensor | None
) -> tuple[Sequence[int], torch.Tensor | None]:
    """Return the updates without dropout that a gradient comes to, and their share of ``a_QI``."""
    if a_QI is None or all(dy is not None for dy in dys):
        return spec.together, a_QI
    parts = dict(zip(spec.together, spec.parts(a_QI, spec.together, 0), strict=True))
    layers = zip(dys, spec.numbers, strict=True)
    live = [i for dy, numbers in layers if dy is not None for i in numbers if i in parts]
    return live, torch.cat([parts[i] for i in live]) if live else None


def _unstacked(spec: Spec, da_QI: torch.Tensor, chosen: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return each A's share of what the stacked ones got, times s, in its own type."""
    da: dict[int, torch.Tensor] = {}
    s = spec.common(chosen)
    dtypes = {spec.updates[i].dtype for i in chosen}
    if s is not None and len(dtypes) == 1:
        da_QI = da_QI.to(dtypes.pop()).mul_(s)
    for i, part in zip(chosen, spec.parts(da_QI, chosen, 0), strict=True):
        facts = spec.updates[i]
        if s is None or part.dtype != facts.dtype:
            part = torch.mul(part.to(facts.dtype), spec.strengths[i])
        da[i] = part
    return da
