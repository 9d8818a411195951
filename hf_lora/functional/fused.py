"""Base layers and their low-rank updates in one autograd function.

``y = x Wᵀ + bias + Σ s · (x Aᵀ) Bᵀ`` for all layers that read the same ``x``. The six small
products of an update (two forward, four back) are added in place into what the base's two large
ones gave; the A's of all layers are one matrix, so that ``x`` is read once for all of them. For the
backward pass only ``x`` is kept, once, or what autograd can rebuild it from; ``h = x Aᵀ`` is
cheaper to compute again than to keep. Formulas: arXiv 2106.09685, differentiated by hand.

Legend: N rows of input, I input features, O output features, R rank, Q ranks of several updates.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from hf_lora.functional.dropout import keep_mask, masked, masked_
from hf_lora.functional.rebuild import Recipe, rebuild

Tensors = Sequence[torch.Tensor]
Perhaps = Sequence[torch.Tensor | None]


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
    x: torch.Tensor, layers: Sequence[Layer], dtype: torch.dtype, recipe: Recipe | None = None
) -> Sequence[torch.Tensor]:
    """Return each layer's output, shape (..., O), in ``dtype``.

    Args:
        x: Shape (..., I); all layers read it.
        layers: The layers. Their weights get no gradient.
        dtype: What is computed in: the type of ``x``, or autocast's.
        recipe: How ``x`` can be computed again, so that it need not be kept.
    """
    updates = [update for layer in layers for update in layer.updates]
    spec = _Spec(
        dtype,
        tuple(layer.y is not None for layer in layers),
        _numbered(layers),
        tuple((update.s, update.dropout) for update in updates),
    )
    biases = [layer.bias_O for layer in layers]
    tensors: list[Any] = [layer.weight_OI if layer.y is None else layer.y for layer in layers]
    tensors += [update.a_RI for update in updates]
    tensors += [update.b_OR for update in updates]
    if torch.is_grad_enabled():
        return _Fused.apply(spec, recipe, biases, x, *tensors)  # type: ignore[return-value]
    with _no_autocast(x):
        return _forward(spec, biases, x, tensors)[0]


def _numbered(layers: Sequence[Layer]) -> tuple[range, ...]:
    ends = list(itertools.accumulate(len(layer.updates) for layer in layers))
    return tuple(
        range(end - len(layer.updates), end) for layer, end in zip(layers, ends, strict=True)
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Spec:
    """What is known without any tensor."""

    dtype: torch.dtype
    on_top: tuple[bool, ...]
    """Which layers computed the base's output themselves."""

    numbers: tuple[range, ...]
    """Each layer's updates, by their numbers."""

    strengths: tuple[tuple[float, float], ...]
    """Each update's s and dropout."""

    def split(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Return what belongs to the layers, the A's, and the B's."""
        layers, updates = len(self.numbers), len(self.strengths)
        return tensors[:layers], tensors[layers : layers + updates], tensors[layers + updates :]

    def scaled(self, i: int, b_OR: torch.Tensor) -> torch.Tensor:
        """Return s · B of update ``i``; what dropout leaves counts for what it drops."""
        return torch.mul(b_OR, self.strength(i)).to(self.dtype)

    def strength(self, i: int) -> float:
        """Return the factor of update ``i``."""
        s, dropout = self.strengths[i]
        return s / (1 - dropout)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return x as rows, in the type that is computed in."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _Fused(torch.autograd.Function):
    """Differentiable in x, in the layers' own outputs, and in all A's and B's."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: _Spec,
        recipe: Recipe | None,
        biases: Perhaps,
        x: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        with _no_autocast(x):
            outputs, weights, masks = _forward(spec, biases, x, tensors)
        _, a, b = spec.split(tensors)
        kept = (x,) if recipe is None else recipe.kept
        ctx.spec, ctx.shape, ctx.expression = spec, x.shape, recipe and recipe.expression
        ctx.save_for_backward(*weights, *a, *b, *masks, *kept)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *dys: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        spec = ctx.spec
        count = len(spec.strengths)
        x_wanted, *wanted = ctx.needs_input_grad[3:]
        y_wanted, a_wanted, b_wanted = spec.split(wanted)
        found = [dy for dy in dys if dy is not None]
        if not found:
            return (None,) * len(ctx.needs_input_grad)
        weights, a, rest = spec.split(ctx.saved_tensors)
        b, masks, kept = rest[:count], rest[count : 2 * count], rest[2 * count :]
        x_NI = None
        with _no_autocast(found[0]):
            if any(a_wanted) or any(b_wanted):
                x = kept[0] if ctx.expression is None else rebuild(ctx.expression, kept)
                x_NI = spec.rows(x.reshape(ctx.shape))
            dh, dx_NI = _to_input(spec, dys, weights, b, x_wanted)
            da, db = _to_factors(spec, dys, x_NI, dh, a, masks, a_wanted, b_wanted)
            if x_wanted:
                dx_NI = _add_to_input(spec, dx_NI, dh, a, masks)
        dx = None if dx_NI is None else dx_NI.view(ctx.shape)
        dy_on_top = [dy if want else None for dy, want in zip(dys, y_wanted, strict=True)]
        return None, None, None, dx, *dy_on_top, *da, *db


def _forward(
    spec: _Spec, biases: Perhaps, x: torch.Tensor, tensors: Tensors
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return each layer's output, each layer's weight as it was used, and each update's mask."""
    bases, a, b = spec.split(tensors)
    x_NI = spec.rows(x)
    masks = [keep_mask(x_NI.shape, p, x.device) if p else None for _, p in spec.strengths]
    h = _shrink(spec, x_NI, a, masks)
    outputs: list[torch.Tensor] = []
    weights: list[torch.Tensor | None] = []
    for base, bias, on_top, numbers in zip(bases, biases, spec.on_top, spec.numbers, strict=True):
        weight_OI = None if on_top else base.to(spec.dtype)
        if weight_OI is None:
            y_NO = spec.rows(base).clone()
        elif bias is None:
            y_NO = torch.mm(x_NI, weight_OI.t())
        else:
            y_NO = torch.addmm(bias.to(spec.dtype), x_NI, weight_OI.t())
        for i in numbers:
            y_NO.addmm_(h[i], spec.scaled(i, b[i]).t())
        outputs.append(y_NO.view(*x.shape[:-1], y_NO.shape[-1]))
        weights.append(weight_OI)
    return outputs, weights, masks


def _shrink(spec: _Spec, x_NI: torch.Tensor, a: Tensors, masks: Perhaps) -> dict[int, torch.Tensor]:
    """Return ``h = x Aᵀ``, shape (N, R), of every update; one product for all without dropout."""
    h = {
        i: torch.mm(masked(x_NI, mask), a[i].to(spec.dtype).t())
        for i, mask in enumerate(masks)
        if mask is not None
    }
    return h | _shrink_whole(spec, x_NI, a, [i for i, mask in enumerate(masks) if mask is None])


def _shrink_whole(
    spec: _Spec, x_NI: torch.Tensor, a: Tensors, chosen: Sequence[int]
) -> dict[int, torch.Tensor]:
    if not chosen:
        return {}
    h_NQ = torch.mm(x_NI, _stacked(spec, a, chosen).t())
    return dict(zip(chosen, _unstacked(h_NQ, a, chosen, dim=1), strict=True))


def _stacked(spec: _Spec, a: Tensors, chosen: Sequence[int]) -> torch.Tensor:
    """Return the chosen A's as one matrix (Q, I)."""
    return torch.cat([a[i] for i in chosen]).to(spec.dtype)


def _unstacked(q: torch.Tensor, a: Tensors, chosen: Sequence[int], dim: int) -> Tensors:
    """Return the chosen updates' shares of something that has Q along ``dim``."""
    return q.split([a[i].shape[0] for i in chosen], dim=dim)


def _to_input(
    spec: _Spec, dys: Perhaps, weights: Perhaps, b: Tensors, x_wanted: bool
) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
    """Return the gradient of each h that has one, and what of x's comes through the weights."""
    dh: dict[int, torch.Tensor] = {}
    dx_NI: torch.Tensor | None = None
    for dy, weight_OI, numbers in zip(dys, weights, spec.numbers, strict=True):
        if dy is None:
            continue
        dy_NO = spec.rows(dy)
        for i in numbers:
            dh[i] = torch.mm(dy_NO, spec.scaled(i, b[i]))
        if x_wanted and weight_OI is not None:
            dx_NI = torch.mm(dy_NO, weight_OI) if dx_NI is None else dx_NI.addmm_(dy_NO, weight_OI)
    return dh, dx_NI


def _to_factors(
    spec: _Spec,
    dys: Perhaps,
    x_NI: torch.Tensor | None,
    dh: dict[int, torch.Tensor],
    a: Tensors,
    masks: Perhaps,
    a_wanted: Sequence[bool],
    b_wanted: Sequence[bool],
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return the gradients of the A's and the B's that want one."""
    da: dict[int, torch.Tensor] = {}
    h: dict[int, torch.Tensor] = {}
    whole = [i for i in dh if masks[i] is None]
    if x_NI is not None:
        if any(b_wanted[i] for i in whole):
            h = _shrink_whole(spec, x_NI, a, whole)
        if any(a_wanted[i] for i in whole):
            da_QI = torch.mm(torch.cat([dh[i] for i in whole], dim=1).t(), x_NI)
            da = dict(zip(whole, _unstacked(da_QI, a, whole, dim=0), strict=True))
        for i in dh.keys() - set(whole):
            seen_NI = masked(x_NI, masks[i])  # type: ignore[arg-type]
            h[i] = torch.mm(seen_NI, a[i].to(spec.dtype).t())
            da[i] = torch.mm(dh[i].t(), seen_NI)
    db: dict[int, torch.Tensor] = {}
    for dy, numbers in zip(dys, spec.numbers, strict=True):
        for i in numbers:
            if dy is not None and b_wanted[i]:
                # the narrow factor first: its product is faster, and the result is small
                db[i] = torch.mm(h[i].t(), spec.rows(dy)).mul_(spec.strength(i)).t()
    return (
        [da.get(i) if want else None for i, want in enumerate(a_wanted)],
        [db.get(i) for i in range(len(b_wanted))],
    )


def _add_to_input(
    spec: _Spec,
    dx_NI: torch.Tensor | None,
    dh: dict[int, torch.Tensor],
    a: Tensors,
    masks: Perhaps,
) -> torch.Tensor:
    """Add what of x's gradient comes through the updates."""
    whole = [i for i in dh if masks[i] is None]
    if whole:
        dh_NQ, a_QI = torch.cat([dh[i] for i in whole], dim=1), _stacked(spec, a, whole)
        dx_NI = torch.mm(dh_NQ, a_QI) if dx_NI is None else dx_NI.addmm_(dh_NQ, a_QI)
    for i in sorted(dh.keys() - set(whole)):
        part_NI = masked_(torch.mm(dh[i], a[i].to(spec.dtype)), masks[i])  # type: ignore[arg-type]
        dx_NI = part_NI if dx_NI is None else dx_NI.add_(part_NI)
    assert dx_NI is not None
    return dx_NI


def _no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which types are what they are said to be."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
