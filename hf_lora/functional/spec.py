"""What a call of several layers and their low-rank updates does, and their factors made ready.

Where a call is short, what stands around the products costs as much as they do: what does not
depend on the numbers is worked out once (:class:`Spec`), and the factors are scaled, stacked and
cast once for both passes (:class:`Factors`).

Legend: I input features, O output features, R rank, Q ranks of several updates.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensors = Sequence[torch.Tensor]
OptionalTensors = Sequence[torch.Tensor | None]


class UpdateSpec(NamedTuple):
    """What one update is, without its numbers."""

    r: int
    s: float
    dropout: float
    dtype: torch.dtype
    """Of its factors, and so of their gradients."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """What a call does, without any tensor: made once for each kind of call."""

    dtype: torch.dtype
    """What is computed in."""

    update_dtype: torch.dtype
    """What the updates' narrow products are computed in: the same, or a wider type."""

    updates: tuple[UpdateSpec, ...]
    """Of all layers, in order; an update's number is its place here."""

    numbers: tuple[range, ...]
    """Each layer's updates, by their numbers."""

    strengths: tuple[float, ...]
    """Each update's s; what dropout leaves counts for what it drops."""

    together: tuple[int, ...]
    """The updates that see all of x: their A's are one matrix."""

    apart: tuple[int, ...]
    """The updates with dropout, each of which sees an x of its own."""

    def parts(self, q: torch.Tensor, chosen: Sequence[int], dim: int) -> Tensors:
        """Return the chosen updates' shares of something that has Q along ``dim``."""
        ranks = [self.updates[i].r for i in chosen]
        return [q] if len(ranks) == 1 else q.split(ranks, dim=dim)

    def common(self, chosen: Sequence[int]) -> float | None:
        """Return the strength that all chosen updates have, or None."""
        first = self.strengths[chosen[0]]
        return first if all(self.strengths[i] == first for i in chosen) else None

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return x as rows, in the type that is computed in."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@functools.lru_cache(maxsize=4096)
def spec_of(
    dtype: torch.dtype, update_dtype: torch.dtype, layers: tuple[tuple[UpdateSpec, ...], ...]
) -> Spec:
    """Return the spec of a call on layers with these updates."""
    updates = tuple(itertools.chain(*layers))
    ends = list(itertools.accumulate(len(layer) for layer in layers))
    return Spec(
        dtype,
        update_dtype,
        updates,
        tuple(range(end - len(layer), end) for layer, end in zip(layers, ends, strict=True)),
        tuple(facts.s / (1 - facts.dropout) for facts in updates),
        tuple(i for i, facts in enumerate(updates) if not facts.dropout),
        tuple(i for i, facts in enumerate(updates) if facts.dropout),
    )


class Factors(NamedTuple):
    """The factors as both passes use them: in the updates' type, s inside of A."""

    a_QI: torch.Tensor | None
    """The A's of all updates without dropout, one below the other."""

    a: Tensors
    """The A's of the updates with dropout."""

    b: Tensors
    """All B's."""


def factors_of(spec: Spec, a: Tensors, b: Tensors) -> Factors:
    """Return the factors ready for use."""
    return Factors(
        _stacked(spec, a),
        [_scaled(spec, a, i) for i in spec.apart],
        [b_OR.to(spec.update_dtype) for b_OR in b],
    )


def _stacked(spec: Spec, a: Tensors) -> torch.Tensor | None:
    chosen = spec.together
    if not chosen:
        return None
    if len(chosen) == 1:
        return _scaled(spec, a, chosen[0])
    s = spec.common(chosen)
    if s is None:
        return torch.cat([_scaled(spec, a, i) for i in chosen])
    return torch.cat([a[i] for i in chosen]).mul_(s).to(spec.update_dtype)


def _scaled(spec: Spec, a: Tensors, i: int) -> torch.Tensor:
    return torch.mul(a[i], spec.strengths[i]).to(spec.update_dtype)
