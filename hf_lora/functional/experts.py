"""A layer of stacked experts with low-rank updates of its matrices, in one autograd function.

Legend: N tokens, K experts for each token, S = N·K routed rows, E experts, I input and O output
features, M features in between, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hf_lora.functional.grouped import (
    Factors,
    Routed,
    apart,
    grouped_outer,
    grouped_product,
    stacked,
)
from hf_lora.functional.packed import Stack, times


class Stacks(NamedTuple):
    """What a layer of experts computes with."""

    up: Stack
    """(E, I, M'): what the first product is with; M' is 2M where there is a gate."""

    down: Stack
    """(E, M, O)."""

    up_bias: torch.Tensor | None
    """(E, M')."""

    down_bias: torch.Tensor | None
    """(E, O)."""

    gate: Callable[[torch.Tensor], torch.Tensor]
    """From (S, M') to (S, M): the activation."""

    after: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What is done to each expert's output, (S, O), before they are weighed."""


class Update(NamedTuple):
    """The updates of one of the two stacks."""

    factors: tuple[Factors, ...] = ()
    dropouts: tuple[float, ...] = ()


def experts_plain(
    x_NI: torch.Tensor,
    weights_NK: torch.Tensor,
    routed: Routed,
    stacks: Stacks,
    up: Update,
    down: Update,
) -> torch.Tensor:
    """Return what :func:`experts` does, by PyTorch's own gradients: its twin, for every case."""
    rows = x_NI[routed.token].to(stacks.up.dtype)
    between = _linear(rows, stacks.up, stacks.up_bias, routed, up)
    out = _linear(stacks.gate(between), stacks.down, stacks.down_bias, routed, down)
    out = out if stacks.after is None else stacks.after(out)
    weighed = out * weights_NK.reshape(-1)[routed.order].unsqueeze(-1)
    return routed.sum_by_token(weighed).to(x_NI.dtype)


def _linear(
    x_SI: torch.Tensor,
    w_EIO: Stack,
    bias_EO: torch.Tensor | None,
    routed: Routed,
    update: Update,
) -> torch.Tensor:
    y_SO = _each(x_SI, w_EIO, routed)
    if bias_EO is not None:
        y_SO = y_SO + bias_EO[routed.expert]
    for factors, dropout in zip(update.factors, update.dropouts, strict=True):
        a_ERI, b_ERO = stacked([factors], x_SI.dtype)
        h_SR = _each(F.dropout(x_SI, dropout) if dropout else x_SI, a_ERI.transpose(1, 2), routed)
        y_SO = y_SO + _each(h_SR, b_ERO, routed)
    return y_SO


def _each(x_SI: torch.Tensor, w_EIO: Stack, routed: Routed) -> torch.Tensor:
    parts = [times(x_SI[a:z], w_EIO, e) for e, a, z in routed.spans]
    return torch.cat(parts) if parts else x_SI.new_empty(0, w_EIO.shape[-1])


def experts(
    x_NI: torch.Tensor,
    weights_NK: torch.Tensor,
    routed: Routed,
    stacks: Stacks,
    up: Sequence[Factors],
    down: Sequence[Factors],
) -> torch.Tensor:
    """Return the weighed sum of each token's experts, with low-rank updates of their matrices.

    Kept for the backward pass are the input, what the first product gives, and rows of the ranks'
    width: the activation and the gathered rows are made again, and the experts' outputs are not
    needed for the weights' gradients. That is less than the frozen experts keep.

    Args:
        x_NI: The tokens.
        weights_NK: What each expert's output counts.
        routed: Which token goes where.
        stacks: The frozen experts; they get no gradient. ``after`` is not possible here.
        up: Updates of the first product's matrices.
        down: Those of the second's.
    """
    tensors = [tensor for each in (*up, *down) for tensor in (each.a, each.b)]
    numbers = tuple(each[2:] for each in (*up, *down))
    frame = _Frame(routed, stacks, len(up), numbers)
    biases = (stacks.up_bias, stacks.down_bias)
    return _Experts.apply(frame, x_NI, weights_NK, stacks.up, stacks.down, *biases, *tensors)


class _Frame(NamedTuple):
    routed: Routed
    stacks: Stacks
    ups: int
    """How many updates the first product has."""

    numbers: tuple[tuple[int, float, bool], ...]
    """r and s of each update, and whether its factors are swapped."""

    def factors(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Factors], list[Factors]]:
        pairs = zip(tensors[::2], tensors[1::2], self.numbers, strict=True)
        found = [Factors(a, b, *rest) for a, b, rest in pairs]
        return found[: self.ups], found[self.ups :]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        frame: _Frame,
        x_NI: torch.Tensor,
        weights_NK: torch.Tensor,
        w_up: Stack,
        w_down: Stack,
        up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        routed, up, down = frame.routed, *frame.factors(tensors)
        with _without_autocast(x_NI):
            rows = x_NI[routed.token].to(w_up.dtype)
            between, h_SR = _forward(rows, w_up, up_bias, routed, up)
            out, _ = _forward(frame.stacks.gate(between), w_down, down_bias, routed, down)
            weights_S = weights_NK.reshape(-1)[routed.order]
            y_NO = routed.sum_by_token(out * weights_S.unsqueeze(-1)).to(x_NI.dtype)
        ctx.frame = frame
        kept = [w if isinstance(w, torch.Tensor) else None for w in (w_up, w_down)]
        saved = (x_NI, weights_NK, *kept, down_bias, between, h_SR)
        ctx.save_for_backward(*saved, *tensors)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        frame: _Frame = ctx.frame
        x_NI, weights_NK, w_up, w_down, down_bias, between, h_SR, *tensors = ctx.saved_tensors
        w_up = frame.stacks.up if w_up is None else w_up
        w_down = frame.stacks.down if w_down is None else w_down
        routed, (up, down) = frame.routed, frame.factors(tensors)
        with _without_autocast(x_NI):
            dy_SO = dy_NO.to(w_down.dtype)[routed.token]
            weights_S1 = weights_NK.reshape(-1)[routed.order].unsqueeze(-1)
            with torch.enable_grad():
                between = between.detach().requires_grad_()
                act_SM = frame.stacks.gate(between)
            back_SM, dfactors_down = _backward(
                act_SM.detach(), dy_SO, w_down, routed, down, weights_S1, wanted=True
            )
            assert back_SM is not None
            dweights = None
            if ctx.needs_input_grad[2]:
                # of y = w · W2 act, without y: dy · (W2 act) = (W2ᵀ dy) · act
                wide = torch.promote_types(act_SM.dtype, torch.float32)
                dw_S = (back_SM.to(wide) * act_SM.detach().to(wide)).sum(-1)
                if down_bias is not None:
                    dw_S = dw_S + (dy_SO.to(wide) * down_bias[routed.expert].to(wide)).sum(-1)
                dweights = routed.unsorted(dw_S).to(weights_NK.dtype)
            dact_SM = (back_SM * weights_S1).to(act_SM.dtype)
            (dbetween,) = torch.autograd.grad(act_SM, between, dact_SM)
            del act_SM, dact_SM, back_SM
            rows = x_NI[routed.token].to(w_up.dtype) if up else None
            dx_SI, dfactors_up = _backward(
                rows, dbetween, w_up, routed, up, None, wanted=ctx.needs_input_grad[1], h_SR=h_SR
            )
            dx_NI = None if dx_SI is None else routed.sum_by_token(dx_SI).to(x_NI.dtype)
        return None, dx_NI, dweights, None, None, None, None, *dfactors_up, *dfactors_down


def _forward(
    x_SI: torch.Tensor,
    w_EIO: Stack,
    bias_EO: torch.Tensor | None,
    routed: Routed,
    updates: Sequence[Factors],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rows' products with biases and updates, and their products with A."""
    y_SO = grouped_product(x_SI, w_EIO, routed)
    if bias_EO is not None:
        y_SO += bias_EO[routed.expert]
    if not updates:
        return y_SO, None
    a_ERI, b_ERO = stacked(updates, x_SI.dtype)
    h_SR = grouped_product(x_SI, a_ERI.transpose(1, 2), routed)
    return grouped_product(h_SR, b_ERO, routed, onto=y_SO), h_SR


def _backward(
    x_SI: torch.Tensor | None,
    dy_SO: torch.Tensor,
    w_EIO: Stack,
    routed: Routed,
    updates: Sequence[Factors],
    weights_S1: torch.Tensor | None,
    *,
    wanted: bool,
    h_SR: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Return the gradient of the rows, not weighed, and those of the updates' factors, weighed.

    Args:
        x_SI: The rows; not needed without updates.
        dy_SO: The gradient of their products.
        w_EIO: The frozen matrices.
        routed: Which rows are whose.
        updates: Those of the matrices.
        weights_S1: What each row counts beside; narrow tensors are multiplied by it, not wide ones.
        wanted: Whether the gradient of the rows is.
        h_SR: The rows' products with A, where they were kept.
    """
    dx_SI = grouped_product(dy_SO, w_EIO.transpose(1, 2), routed) if wanted else None
    if not updates:
        return dx_SI, []
    assert x_SI is not None
    a_ERI, b_ERO = stacked(updates, dy_SO.dtype)
    h_SR = grouped_product(x_SI, a_ERI.transpose(1, 2), routed) if h_SR is None else h_SR
    dh_SR = grouped_product(dy_SO, b_ERO.transpose(1, 2), routed)
    if dx_SI is not None:
        grouped_product(dh_SR, a_ERI, routed, onto=dx_SI)
    if weights_S1 is not None:
        h_SR, dh_SR = ((each * weights_S1).to(each.dtype) for each in (h_SR, dh_SR))
    da_ERI = grouped_outer(dh_SR, x_SI, routed)
    db_ERO = grouped_outer(h_SR, dy_SO, routed)
    return dx_SI, apart(updates, da_ERI, db_ERO)


def _without_autocast(tensor: torch.Tensor) -> Any:
    # grouped products are outside of autocast in transformers, too
    return torch.autocast(tensor.device.type, enabled=False)
