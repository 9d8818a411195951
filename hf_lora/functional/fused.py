"""Base layers and their low-rank updates in one autograd function.

``y = x Wᵀ + bias + Σ s · (x Aᵀ) Bᵀ`` for all layers that read the same ``x``; the arithmetic is in
:mod:`hf_lora.functional.passes`. For the backward pass only ``x`` is kept, once, or what autograd
can rebuild it from, and the factors as they were used; ``h = s · x Aᵀ`` is cheaper to compute
again than to keep, except behind dropout.

In 16 bits the update's products may be computed in float32 instead; then the factors' gradients
are rounded nowhere, and y once. Where a processor or a GPU has products of 16 bits, that costs more
passes over x and dy, and is little use: what the base's own roundings do to the gradients, in every
way alike, is several times as much (``examples/benchmarks/results``).
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hf_lora.functional.again import differentiable_backward
from hf_lora.functional.passes import SavedForBackward, backward_pass, forward_pass
from hf_lora.functional.recompute import Recompute, recomputed, recomputed_rows
from hf_lora.functional.scaled_rows import ScaledRows
from hf_lora.functional.spec import Factors, OptionalTensors, Spec, UpdateSpec, factors_of, spec_of


class Update(NamedTuple):
    """One adapter's update on one layer: ``s · (x Aᵀ) Bᵀ``."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    s: float
    dropout: float = 0.0
    """Share of the elements of x that this update does not see; 0 outside of training."""


class Layer(NamedTuple):
    """A frozen base layer and its updates, at least one."""

    updates: Sequence[Update]
    weight_OI: torch.Tensor | None = None
    bias_O: torch.Tensor | None = None
    y: torch.Tensor | None = None
    """The base's output, where it computes that in a way of its own (a quantized one)."""


def fused(
    x: torch.Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    recipe: Recompute | None = None,
    *,
    update_dtype: torch.dtype | None = None,
    keep_h: bool = False,
) -> Sequence[torch.Tensor]:
    """Return each layer's output, shape (..., O), in ``dtype``.

    Args:
        x: Shape (..., I); all layers read it.
        layers: The layers. Their weights get no gradient.
        dtype: What is computed in: the type of ``x``, or autocast's.
        recipe: How ``x`` can be computed again, so that it need not be kept.
        update_dtype: What the updates' narrow products are computed in, if not in ``dtype``;
            then a layer's updates are rounded to ``dtype`` once, together with the base's output.
        keep_h: Keep ``h`` as well, because somebody may write ``x`` before the backward pass.
    """
    spec = spec_of(
        dtype,
        update_dtype or dtype,
        tuple(
            tuple(UpdateSpec(u.a_RI.shape[0], u.s, u.dropout, u.a_RI.dtype) for u in layer.updates)
            for layer in layers
        ),
    )
    tensors = [layer.weight_OI if layer.y is None else layer.y for layer in layers]
    tensors += [update.a_RI for layer in layers for update in layer.updates]
    tensors += [update.b_OR for layer in layers for update in layer.updates]
    call = _Call(spec, recipe, layers, keep_h)
    if torch.is_grad_enabled():
        return _Fused.apply(call, x, *tensors)  # type: ignore[return-value]
    with _no_autocast(x):
        return call.forward(x, tensors)[0]  # type: ignore[arg-type]


class _Call(NamedTuple):
    """What is given to one call beside the tensors that gradients are asked for."""

    spec: Spec
    recipe: Recompute | None
    layers: Sequence[Layer]
    keep_h: bool

    def forward(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None], Factors, SavedForBackward]:
        """Return the layers' outputs, and what the backward pass needs."""
        spec, count = self.spec, len(self.layers)
        bases, factors = tensors[:count], tensors[count:]
        ready = factors_of(spec, factors[: len(spec.updates)], factors[len(spec.updates) :])
        weights = [
            base.to(spec.dtype) if layer.y is None else None
            for layer, base in zip(self.layers, bases, strict=True)
        ]
        biases = [layer.bias_O for layer in self.layers]
        outputs, seen = forward_pass(spec, x, bases, weights, biases, ready)
        return outputs, weights, ready, seen


class _Fused(torch.autograd.Function):
    """Differentiable in x, in the layers' own outputs, and in all A's and B's."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        with _no_autocast(x):
            outputs, weights, (a_QI, a, b), (masks, h, h_NQ) = call.forward(x, tensors)
        recipe = call.recipe
        kept = (x,) if recipe is None else recipe.kept
        ctx.spec, ctx.shape, ctx.expression = call.spec, x.shape, recipe and recipe.expression
        ctx.factors = tensors[len(call.layers) :]
        ctx.versions = [factor._version for factor in ctx.factors]
        h_NQ = h_NQ if call.keep_h else None
        ctx.save_for_backward(*weights, a_QI, *a, *b, *masks, *h, h_NQ, *kept)
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(*_constant(call, outputs, ctx.needs_input_grad[2:]))
        return tuple(outputs)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, *dys: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        spec: Spec = ctx.spec
        needs = ctx.needs_input_grad
        some = next((dy for dy in dys if dy is not None), None)
        if some is None:
            return (None,) * len(needs)
        layers, updates, apart = len(dys), len(spec.updates), len(spec.apart)
        weights, a_QI, a, b, masks, h, h_NQ, kept = _cut(
            ctx.saved_tensors, layers, 1, apart, updates, apart, apart, 1
        )

        def input_rows() -> ScaledRows:
            if ctx.expression is None:
                return ScaledRows(spec.rows(kept[0]).to(spec.update_dtype))
            return recomputed_rows(ctx.expression, kept, ctx.shape[-1], spec.update_dtype)

        wanted = needs[1], needs[2 + layers : 2 + layers + updates], needs[2 + layers + updates :]
        with _no_autocast(some):
            if torch.is_grad_enabled():  # somebody will differentiate again
                x = kept[0] if ctx.expression is None else recomputed(ctx.expression, kept)
                factors = _unchanged(ctx.factors, ctx.versions)
                dx_NI, da, db = differentiable_backward(
                    spec, dys, weights, factors, masks, spec.rows(x), wanted
                )
            else:
                seen = SavedForBackward(masks, h, h_NQ[0])
                dx_NI, da, db = backward_pass(
                    spec, dys, weights, Factors(a_QI[0], a, b), seen, input_rows, wanted
                )
        dx = None if dx_NI is None else dx_NI.view(ctx.shape)
        dy_on_top = [dy if want else None for dy, want in zip(dys, needs[2:], strict=False)]
        return None, dx, *dy_on_top, *da, *db


def _constant(
    call: _Call, outputs: Sequence[torch.Tensor], needs: Sequence[bool]
) -> list[torch.Tensor]:
    """Return the outputs that depend on nothing that a gradient is asked for, x being none."""
    layers, updates = len(call.layers), len(call.spec.updates)
    return [
        y
        for number, (y, numbers) in enumerate(zip(outputs, call.spec.numbers, strict=True))
        if not needs[number]
        and not any(needs[layers + i] or needs[layers + updates + i] for i in numbers)
    ]


def _unchanged(factors: Sequence[torch.Tensor], versions: Sequence[int]) -> Sequence[torch.Tensor]:
    """Return the factors that the forward pass had, or raise as autograd does for what it keeps."""
    if [factor._version for factor in factors] != list(versions):
        raise RuntimeError(
            "a factor of a LoRA layer needed for a second derivative has been modified by an "
            "inplace operation since the forward pass, such as an optimizer's step; "
            "differentiate before it"
        )
    return factors


def _cut(saved: OptionalTensors, *lengths: int) -> list[Any]:
    """Return consecutive pieces of these lengths, and what is left."""
    pieces, start = [], 0
    for length in lengths:
        pieces.append(saved[start : start + length])
        start += length
    return [*pieces, saved[start:]]


def _no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which types are what they are said to be."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
