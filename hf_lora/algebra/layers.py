"""The low-rank updates of layers, put together from those of several adapters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from hf_lora.algebra.method import CAT, Method
from hf_lora.algebra.sources import Adapter, not_finite
from hf_lora.files.data import LayerTensors
from hf_lora.functional.decompose import (
    Spaces,
    Spectrum,
    inner,
    padded,
    rounding,
    spaces,
    spectrum,
)
from hf_lora.functional.low_rank import Product
from hf_lora.kinds.experts import PARTS
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import LORA_BIAS
from hf_lora.layers.reading import out_slot


@dataclasses.dataclass(frozen=True)
class Term:
    """One adapter's update of one layer."""

    weight: float
    config: LayerConfig
    held: LayerTensors
    tensors: Mapping[str, torch.Tensor]

    @property
    def strength(self) -> float:
        """What the product of its factors is multiplied by."""
        return self.weight * self.config.scaling

    def products(self) -> dict[str, Product]:
        """Return the factors of each part, as the file has them."""
        assert self.held.layout.split is not None
        return self.held.layout.split(self.tensors, self.config)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of the result."""

    config: LayerConfig
    held: LayerTensors
    """Of the adapter that it follows in all but rank and strength."""

    tensors: dict[str, torch.Tensor]
    """Role to tensor, low-rank ones alone."""

    norm: float
    """Of the exact update."""

    residual: float
    """Norm of what the tensors lack of it."""


def read_term(adapter: Adapter, path: str) -> Term:
    """Read one adapter's tensors of one layer.

    Raises:
        AdapterFileError: A number is not finite.
    """
    held = adapter.folder.factors[path]
    values = dict(adapter.folder.file.read(list(held.keys.values())))
    bad = [key for key, tensor in values.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise not_finite(adapter, bad)
    tensors = {role: values[key] for role, key in held.keys.items()}
    return Term(adapter.weight, adapter.folder.slots[path], held, tensors)


def combined(
    terms: Mapping[str, Sequence[Term]],
    method: Method,
    dtype: torch.dtype | None,
    *,
    rslora: bool = False,
) -> dict[str, Layer]:
    """Return the sum of each layer's terms; the layers get the same rank.

    Args:
        terms: Path to terms: of one layer, or of an attention and its last layer.
        method: How.
        dtype: Type of the tensors; None for that of the terms.
        rslora: How the result is scaled.
    """
    sums = {path: _Sum(path, each, method) for path, each in terms.items()}
    rank = max(each.rank() for each in sums.values())
    leader, *others = sums
    found = {leader: sums[leader].layer(rank, sums[leader].slot(rank, rslora), dtype)}
    for path in others:
        own = sums[path].slot(rank, rslora)
        slot = dataclasses.replace(own, alpha=out_slot(found[leader].config).alpha)
        found[path] = sums[path].layer(rank, slot, dtype)
    return found


class _Sum:
    """The sum of several updates of one layer."""

    def __init__(self, path: str, terms: Sequence[Term], method: Method):
        self.terms = terms
        self.method = method
        self.first = max(terms, key=lambda term: abs(term.strength))
        """The strongest: with its scaling no factor is multiplied by more than 1."""

        self.reference = self.first.config
        self.parts: dict[str, list[tuple[float, Product]]] = {}
        for term in terms:
            for part, product in term.products().items():
                self.parts.setdefault(part, []).append((term.strength, product))
        self.found: dict[str, Spectrum] = {}
        """Parts that get new factors."""

        if method.name != CAT:
            for part, each in self.parts.items():
                found = method.decomposed(spaces(_wide(each)), f"{path}.{part}")
                if not method.is_linear or method.rank_of(found) < _ranks(each):
                    self.found[part] = found
        else:  # what is wider than the layer itself is no shorter for it
            for part, each in self.parts.items():
                if _ranks(each) > min(each[0][1].left.shape[1], each[0][1].right.shape[2]):
                    shared = spaces(_wide(each))
                    self.found[part] = spectrum(shared, _total(shared))

    @property
    def groups(self) -> int:
        """How often the rank of a product goes into that of the layer: of convolutions."""
        _, product = next(iter(self.parts.values()))[0]
        own = next(iter(self.terms)).config.r
        return max(1, own // product.left.shape[2])

    def rank(self) -> int:
        """Return the rank that the layer gets if it is alone."""
        method = self.method
        if method.rank is not None:
            method = dataclasses.replace(method, rank=max(1, method.rank // self.groups))
        ranks = [
            method.rank_of(self.found[part]) if part in self.found else _ranks(each)
            for part, each in self.parts.items()
        ]
        return max(ranks) * self.groups

    def slot(self, rank: int, rslora: bool) -> LayerConfig:
        """Return the numbers of the layer: the scaling of the strongest term, at another rank."""
        old, weight = self.reference, abs(self.first.weight)
        if old.rslora == rslora:  # of the same rank it is the same number, to the bit
            ratio = rank / old.r
            alpha = old.alpha * weight * (math.sqrt(ratio) if rslora else ratio)
        else:
            alpha = old.scaling * weight * (math.sqrt(rank) if rslora else rank)
        parts = {part for term in self.terms for part in term.config.parts}
        return dataclasses.replace(
            old,
            r=rank,
            alpha=alpha,
            rslora=rslora,
            lora_bias=any(LORA_BIAS in term.tensors for term in self.terms),
            parts=tuple(part for part in PARTS if part in parts),
        )

    def layer(self, rank: int, slot: LayerConfig, dtype: torch.dtype | None) -> Layer:
        """Return the layer with tensors of a rank."""
        made: dict[str, Product] = {}
        norms: list[float] = []
        lost: list[float] = []
        for part, each in self.parts.items():
            own = dtype or _type(each)
            exact, norm, missing = self._exact(part, each, rank // self.groups, slot.scaling)
            rounded = Product(exact.left.to(own), exact.right.to(own))
            made[part] = rounded
            off = rounding(exact, rounded) * slot.scaling
            norms.append(norm)
            lost += [missing, off]
        held = max((term.held for term in self.terms), key=lambda held: len(held.shapes))
        assert held.layout.join is not None
        tensors = dict(held.layout.join(made, held.shapes))
        if any(LORA_BIAS in term.tensors for term in self.terms):
            tensors[LORA_BIAS] = self._bias(slot, dtype)
        return Layer(slot, held, tensors, math.hypot(*norms), math.hypot(*lost))

    def _exact(
        self, part: str, each: Sequence[tuple[float, Product]], rank: int, scaling: float
    ) -> tuple[Product, float, float]:
        """Return factors in float64, the norm of what is asked for, and of what they lack of it."""
        if part not in self.found:
            left = torch.cat([p.left.double() * (s / scaling) for s, p in each], 2)
            right = torch.cat([p.right.double() for _, p in each], 1)
            whole = Product(left, right)
            norm = scaling * math.sqrt(max(inner(whole, whole), 0.0))
            return padded(whole, rank), norm, 0.0
        found = self.found[part]
        left, right = found.product(rank)
        root = math.sqrt(scaling)
        norm = math.sqrt(float(found.squares.sum()))
        return Product(left / root, right / root), norm, found.lost(rank)

    def _bias(self, slot: LayerConfig, dtype: torch.dtype | None) -> torch.Tensor:
        """Return the sum of the biases on B, which are scaled as the updates are."""
        biases = [(t.strength, t.tensors[LORA_BIAS]) for t in self.terms if LORA_BIAS in t.tensors]
        total = sum(bias.double() * (s / slot.scaling) for s, bias in biases)
        assert isinstance(total, torch.Tensor)
        own = biases[0][1].dtype
        for _, bias in biases:
            own = torch.promote_types(own, bias.dtype)
        return total.to(dtype or own)


def _wide(each: Sequence[tuple[float, Product]]) -> list[Product]:
    return [Product(p.left.double() * s, p.right) for s, p in each]


def _total(shared: Spaces) -> torch.Tensor:
    return torch.stack(shared.cores).sum(0)


def _ranks(each: Sequence[tuple[float, Product]]) -> int:
    return sum(product.left.shape[2] for _, product in each)


def _type(each: Sequence[tuple[float, Product]]) -> torch.dtype:
    own = each[0][1].left.dtype
    for _, product in each:
        for factor in product:
            own = torch.promote_types(own, factor.dtype)
    return own
