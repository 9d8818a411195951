"""Low-rank updates on a linear-like layer: its adapters' factors, and the forward with them."""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from hf_lora.compat.deepspeed import shape_of
from hf_lora.functional.low_rank import Product, product, update_norm
from hf_lora.layers.biases import Biased, bias_products, on_b_fault
from hf_lora.layers.dispatch import computed, how_computed
from hf_lora.layers.hosts import features, rank_fault, why_not
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import LORA_A, LORA_B, LORA_BIAS, factor_names
from hf_lora.layers.probe import (
    gradient_fault,
    host_class,
    is_linear_in_its_weight,
    is_plain,
    probe_key,
)
from hf_lora.layers.roles import Layout, Shapes
from hf_lora.layers.tensor_parallel import split_factors, split_of


def _fault(shapes: Shapes) -> str | None:
    a, b = shapes[LORA_A], shapes[LORA_B]
    fits = len(a) == len(b) == 2 and a[0] == b[1]
    if not fits or 0 in (*a, *b):
        return f"has lora_A {a} and lora_B {b}, which do not fit together"
    return on_b_fault(shapes)


def _norm(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> float:
    return update_norm(tensors[LORA_A], tensors[LORA_B], config.scaling)


def _split(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> dict[str, Product]:
    return {"weight": Product(tensors[LORA_B][None], tensors[LORA_A][None])}


def _join(products: Mapping[str, Product], shapes: Shapes) -> dict[str, torch.Tensor]:
    left, right = products["weight"]
    return {LORA_A: right[0], LORA_B: left[0]}


LOW_RANK = Layout(
    roles=(LORA_A, LORA_B),
    fault=_fault,
    rank=lambda shapes: shapes[LORA_A][0],
    norm=_norm,
    beside=(LORA_BIAS,),
    widths=lambda shapes: (shapes[LORA_A][1], shapes[LORA_B][0]),
    split=_split,
    join=_join,
)
"""A (r, in) and B (out, r) of a linear layer."""


class LoRALayer(Biased):
    """Mixin that adds low-rank updates to a linear-like host: ``y = host(x) + Σ s · (x Aᵀ) Bᵀ``."""

    lora_layout = LOW_RANK

    weight: Any
    bias: Any
    """The host's own: whatever it keeps there."""

    @classmethod
    def lora_widths(cls, host: nn.Module) -> tuple[int, int] | None:
        """Return (in, out), here as a host declares them under PyTorch's names."""
        return int(host.in_features), int(host.out_features)  # type: ignore[arg-type]

    @classmethod
    def lora_takes(cls, host: nn.Module) -> bool:
        """Say whether a module declares an input and an output width."""
        return features(host) is not None

    @classmethod
    def lora_fault(cls, host: nn.Module) -> str | None:
        """Return why a linear-like module cannot get a low-rank update, or None."""
        return why_not(host)

    @classmethod
    def lora_rank_fault(cls, host: nn.Module, r: int) -> str | None:
        """Return what is wrong with a rank: it is at most the smaller width."""
        return rank_fault(host, r)

    @classmethod
    def lora_gradient_fault(cls, host: nn.Module, *, certain: bool = False) -> str | None:
        """Run the host on a row of ones and say why no gradient would reach it, or None."""
        return gradient_fault(host, certain=certain)

    @classmethod
    def lora_probe_key(cls, host: nn.Module) -> tuple | None:
        """Return what is common to hosts that behave alike; None for a plain linear layer."""
        return None if is_plain(host) else probe_key(host)

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        sizes = features(host)
        assert sizes is not None
        return {LORA_A: (config.r, sizes[0]), LORA_B: (sizes[1], config.r)}

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return how the widths differ, or None."""
        sizes, given = features(host), (shapes[LORA_A][1], shapes[LORA_B][0])
        if sizes != given:
            return f"the adapter is for in, out = {given}, the layer has {sizes}"
        return None

    def lora_features(self) -> tuple[int, int]:
        """Return (in, out) as the host declares them; its weight may be packed or sharded."""
        sizes = self.lora_widths(self)
        assert sizes is not None
        return sizes

    def lora_held(self, adapter: str) -> tuple[str, ...]:
        """Return the names of A and B, which are the same on all layers."""
        names = self.lora_routing.factors.get(adapter)
        if names is None:
            names = self.lora_routing.factors[adapter] = factor_names(adapter)
        return names

    def lora_misfit(self) -> str | None:
        """Return whether the host has other widths now, or None."""
        sizes = self.lora_features()
        for name in self.lora_slots:
            a_RI, b_OR = self.lora_pair(name)
            if (shape_of(a_RI)[1], shape_of(b_OR)[0]) != sizes:
                return f"has other sizes now (in, out = {sizes}) than its adapter"
        return None

    def lora_how(self, grouped: Set[nn.Module]) -> str | None:
        """Return how the layer computes in training: see ``layers.dispatch``."""
        return how_computed(self, grouped)

    def lora_split(self, adapter: str, mesh: Any) -> list[nn.Parameter]:
        """Split one factor as the weight is, if it is; the other has a part of a sum."""
        split = split_of(self)
        split_factors(self, adapter, split, mesh)
        pair = zip((LORA_A, LORA_B), self.lora_pair(adapter), strict=True)
        return [factor for role, factor in pair if role not in split.dims] if split else []

    def lora_merge_fault(self) -> str | None:
        """Return why updates cannot be put into the weight, or None."""
        fault = super().lora_merge_fault()
        if fault is None and not is_linear_in_its_weight(self):
            return (
                f"the forward of its base ({self.lora_host.__name__}) is not x Wᵀ + b, so "
                "W + s·B A would not do the same"
            )
        return fault

    @classmethod
    def lora_product_fault(cls, host: nn.Module) -> str | None:
        """Return why the weight does not say what the host does, or None."""
        if is_linear_in_its_weight(host):
            return None
        return f"the forward of its base ({host_class(host).__name__}) is not x Wᵀ + b"

    @classmethod
    def lora_products(
        cls, host: nn.Module, config: LayerConfig, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Product]:
        """Return the update of the weight, in its own layout."""
        a, b = tensors[LORA_A], tensors[LORA_B]
        weight = product(a, b, config.scaling, turned=cls.fan_in_fan_out)
        return {"weight": weight} | bias_products(config, tensors)

    def lora_pair(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A (r, in) and B (out, r) of an adapter."""
        key_a, key_b = self.lora_routing.factors.get(adapter) or factor_names(adapter)
        a_RI, b_OR = self._parameters.get(key_a), self._parameters.get(key_b)
        if a_RI is None or b_OR is None:  # the replicas of nn.DataParallel keep plain attributes
            return getattr(self, key_a), getattr(self, key_b)
        return a_RI, b_OR

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the host's output plus every active adapter's update."""
        return computed(self, args, kwargs)

    def lora_base(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the host's output alone."""
        return super().forward(*args, **kwargs)

    def lora_own(self, name: str) -> Any:
        """Return the base's own weight or bias, as the host computes with it."""
        return getattr(self, name)


LoRALayer.lora_mixin = LoRALayer
