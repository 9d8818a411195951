"""Base layers and their low-rank updates in one autograd function.

``y = x Wᵀ + bias + Σ s · (x Aᵀ) Bᵀ`` for all layers that read the same ``x``. The six small
products of an update (two forward, four back) are added in place into what the base's two large
ones gave; the A's of all layers are one matrix, so that ``x`` is read once for all of them. For the
backward pass only ``x`` is kept, once, or what autograd can rebuild it from; ``h = s · x Aᵀ``
is cheaper to compute again than to keep. Formulas: arXiv 2106.09685, differentiated by hand.

Legend: N rows of input, I input features, O output features, R rank, Q ranks of several updates.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
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
        tuple(update.s / (1 - update.dropout) for update in updates),
        tuple(update.dropout for update in updates),
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

    strengths: tuple[float, ...]
    """Each update's s; what dropout leaves counts for what it drops."""

    dropouts: tuple[float, ...]
    """Each update's share of the elements of x that it does not see."""

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Return what belongs to the layers, the A's, and the B's."""
        layers, updates = len(self.numbers), len(self.strengths)
        return tensors[:layers], tensors[layers : layers + updates], tensors[layers + updates :]

    def scaled(self, i: int, a_RI: torch.Tensor) -> torch.Tensor:
        """Return s · A of update ``i``."""
        return torch.mul(a_RI, self.strengths[i]).to(self.dtype)

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
        spec: _Spec = ctx.spec
        count = len(spec.strengths)
        x_wanted, *wanted = ctx.needs_input_grad[3:]
        y_wanted, a_wanted, b_wanted = spec.split(wanted)
        found = [dy for dy in dys if dy is not None]
        if not found:
            return (None,) * len(ctx.needs_input_grad)
        weights, a, rest = spec.split(ctx.saved_tensors)
        b, masks, kept = rest[:count], rest[count : 2 * count], rest[2 * count :]

        def input_rows() -> torch.Tensor:
            x = kept[0] if ctx.expression is None else rebuild(ctx.expression, kept)
            return spec.rows(x.reshape(ctx.shape))

        with _no_autocast(found[0]):
            step = _Backward(spec, dys, weights, a, b, masks, input_rows)
            dx_NI, da, db = step.run(x_wanted, a_wanted, b_wanted)
        dx = None if dx_NI is None else dx_NI.view(ctx.shape)
        dy_on_top = [dy if want else None for dy, want in zip(dys, y_wanted, strict=True)]
        return None, None, None, dx, *dy_on_top, *da, *db


def _forward(
    spec: _Spec, biases: Perhaps, x: torch.Tensor, tensors: Tensors
) -> tuple[list[torch.Tensor], list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return each layer's output, each layer's weight as it was used, and each update's mask."""
    bases, a, b = spec.split(tensors)
    x_NI = spec.rows(x)
    masks = [keep_mask(x_NI.shape, p, x.device) if p else None for p in spec.dropouts]
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
            y_NO.addmm_(h[i], b[i].to(spec.dtype).t())
        outputs.append(y_NO.view(*x.shape[:-1], y_NO.shape[-1]))
        weights.append(weight_OI)
    return outputs, weights, masks


def _shrink(spec: _Spec, x_NI: torch.Tensor, a: Tensors, masks: Perhaps) -> dict[int, torch.Tensor]:
    """Return ``h = s · x Aᵀ``, (N, R), of every update; one product for all without dropout."""
    h = {
        i: torch.mm(masked(x_NI, mask), spec.scaled(i, a[i]).t())
        for i, mask in enumerate(masks)
        if mask is not None
    }
    return h | _shrink_whole(spec, x_NI, a, [i for i, mask in enumerate(masks) if mask is None])


def _shrink_whole(
    spec: _Spec, x_NI: torch.Tensor, a: Tensors, chosen: Sequence[int]
) -> dict[int, torch.Tensor]:
    if not chosen:
        return {}
    return _shrink_by(_stacked(spec, a, chosen), x_NI, a, chosen)


def _shrink_by(
    a_QI: torch.Tensor, x_NI: torch.Tensor, a: Tensors, chosen: Sequence[int]
) -> dict[int, torch.Tensor]:
    h_NQ = torch.mm(x_NI, a_QI.t())
    return dict(zip(chosen, _unstacked(h_NQ, a, chosen, dim=1), strict=True))


def _stacked(spec: _Spec, a: Tensors, chosen: Sequence[int]) -> torch.Tensor:
    """Return the chosen s · A as one matrix (Q, I)."""
    if len(chosen) == 1:
        return spec.scaled(chosen[0], a[chosen[0]])
    s = _common(spec, chosen)
    if s is None:
        return torch.cat([spec.scaled(i, a[i]) for i in chosen])
    return torch.mul(torch.cat([a[i] for i in chosen]), s).to(spec.dtype)


def _common(spec: _Spec, chosen: Sequence[int]) -> float | None:
    """Return the s that all chosen updates have, or None."""
    found = {spec.strengths[i] for i in chosen}
    return found.pop() if len(found) == 1 else None


def _unstacked(q: torch.Tensor, a: Tensors, chosen: Sequence[int], dim: int) -> Tensors:
    """Return the chosen updates' shares of something that has Q along ``dim``."""
    return [q] if len(chosen) == 1 else q.split([a[i].shape[0] for i in chosen], dim=dim)


class _Backward:
    """The gradients of one call, in the order that finds most of what it reads in the cache."""

    def __init__(
        self,
        spec: _Spec,
        dys: Perhaps,
        weights: Perhaps,
        a: Tensors,
        b: Tensors,
        masks: Perhaps,
        input_rows: Callable[[], torch.Tensor],
    ):
        self.spec, self.weights, self.a, self.b, self.masks = spec, weights, a, b, masks
        self.input_rows = input_rows
        self.rows = [None if dy is None else spec.rows(dy) for dy in dys]
        self.live = [
            i
            for dy, numbers in zip(dys, spec.numbers, strict=True)
            if dy is not None
            for i in numbers
        ]
        self.whole = [i for i in self.live if masks[i] is None]
        self.dropped = [i for i in self.live if masks[i] is not None]
        self.a_QI = _stacked(spec, a, self.whole) if self.whole else torch.empty(0)
        self.h: dict[int, torch.Tensor] = {}
        self.dh: dict[int, torch.Tensor] = {}
        self.da: dict[int, torch.Tensor] = {}
        self.db: dict[int, torch.Tensor] = {}
        self.dx_NI: torch.Tensor | None = None

    def run(
        self, x_wanted: bool, a_wanted: Sequence[bool], b_wanted: Sequence[bool]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Return the gradients of x, of the A's and of the B's; None for one that nobody wants."""
        whole_a = any(a_wanted[i] for i in self.whole)
        x_NI = self.input_rows() if any(a_wanted) or any(b_wanted) else None
        if x_NI is not None and any(b_wanted[i] for i in self.whole):
            self.h |= _shrink_by(self.a_QI, x_NI, self.a, self.whole)
        for dy_NO, weight_OI, numbers in zip(
            self.rows, self.weights, self.spec.numbers, strict=True
        ):
            if dy_NO is not None:
                self.through_layer(dy_NO, weight_OI if x_wanted else None, numbers, x_NI, b_wanted)
        parts = [self.dh[i] for i in self.whole]
        dh_NQ = None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if x_wanted:
            self.through_updates(dh_NQ)
        if dh_NQ is not None and x_NI is not None and whole_a:
            self.to_stacked(torch.mm(dh_NQ.t(), x_NI))
        return (
            self.dx_NI,
            [self.da.get(i) if want else None for i, want in enumerate(a_wanted)],
            [self.db.get(i) if want else None for i, want in enumerate(b_wanted)],
        )

    def through_layer(
        self,
        dy_NO: torch.Tensor,
        weight_OI: torch.Tensor | None,
        numbers: range,
        x_NI: torch.Tensor | None,
        b_wanted: Sequence[bool],
    ) -> None:
        """Do all that reads one layer's dy."""
        for i in numbers:
            self.dh[i] = torch.mm(dy_NO, self.b[i].to(self.spec.dtype))
            mask = self.masks[i]
            if mask is not None and x_NI is not None:
                seen_NI = masked(x_NI, mask)
                self.h[i] = torch.mm(seen_NI, self.spec.scaled(i, self.a[i]).t())
                self.da[i] = torch.mm(self.dh[i].t(), seen_NI).mul_(self.spec.strengths[i])
            if b_wanted[i]:
                # the narrow factor first: its product is faster, and the result is small
                self.db[i] = torch.mm(self.h[i].t(), dy_NO).t()
        if weight_OI is not None:
            self.dx_NI = (
                torch.mm(dy_NO, weight_OI)
                if self.dx_NI is None
                else self.dx_NI.addmm_(dy_NO, weight_OI)
            )

    def to_stacked(self, da_QI: torch.Tensor) -> None:
        """Give each A its share of what the stacked ones got, times s."""
        s = _common(self.spec, self.whole)
        parts = _unstacked(da_QI if s is None else da_QI.mul_(s), self.a, self.whole, dim=0)
        for i, part in zip(self.whole, parts, strict=True):
            self.da[i] = part.mul_(self.spec.strengths[i]) if s is None else part

    def through_updates(self, dh_NQ: torch.Tensor | None) -> None:
        """Add what of x's gradient comes through the updates."""
        if dh_NQ is not None:
            a_QI = self.a_QI
            self.dx_NI = (
                torch.mm(dh_NQ, a_QI) if self.dx_NI is None else self.dx_NI.addmm_(dh_NQ, a_QI)
            )
        for i in self.dropped:
            mask = self.masks[i]
            assert mask is not None
            part_NI = masked_(torch.mm(self.dh[i], self.spec.scaled(i, self.a[i])), mask)
            self.dx_NI = part_NI if self.dx_NI is None else self.dx_NI.add_(part_NI)


def _no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which types are what they are said to be."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
