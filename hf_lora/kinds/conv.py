"""LoRA on convolutions: a narrow convolution like the host's, then one of width 1 to its channels.

As PEFT has it: A reads all input channels, also of a grouped host, and B is grouped as the host is.
Legend: I input channels, O output channels, R rank, G groups, K the kernel's positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hf_lora.functional.low_rank import Product, product, update_norm
from hf_lora.layers.biases import Biased, bias_products, on_b_fault
from hf_lora.layers.hosts import has_float_weight, taken_names
from hf_lora.layers.instance_forward import has_foreign_forward
from hf_lora.layers.kind import Patched
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import DEFAULT, LORA_A, LORA_B, LORA_BIAS
from hf_lora.layers.probe import host_class
from hf_lora.layers.roles import Layout, Shapes
from hf_lora.layers.tensor_parallel import to_local

_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_GROUPED = "it is grouped, and an update reads all channels, which its weight cannot say"
_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def _fault(shapes: Shapes) -> str | None:
    a, b = shapes[LORA_A], shapes[LORA_B]
    fits = len(a) == len(b) and 3 <= len(a) <= 5 and set(b[2:]) == {1}
    if not fits or 0 in (*a, *b) or a[0] % b[1] or b[0] % (a[0] // b[1]):
        return f"has lora_A {a} and lora_B {b}, which do not fit together"
    return on_b_fault(shapes)


def _norm(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> float:
    """Return the norm of ``s · B A``; that of several groups is the root of the squares' sum."""
    a_RK, b_OR = tensors[LORA_A].flatten(1), tensors[LORA_B].flatten(1)
    groups = len(a_RK) // b_OR.shape[1]
    parts = zip(a_RK.chunk(groups), b_OR.chunk(groups), strict=True)
    return math.hypot(*(update_norm(a, b, config.scaling) for a, b in parts))


def _split(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> dict[str, Product]:
    """Return B (G, O/G, R/G) and A (G, R/G, I·K): each group's rows of B read its part of A."""
    a_RK, b_OR = tensors[LORA_A].flatten(1), tensors[LORA_B].flatten(1)
    each = b_OR.shape[1]
    groups = len(a_RK) // each
    return {"weight": Product(b_OR.view(groups, -1, each), a_RK.view(groups, each, -1))}


def _join(products: Mapping[str, Product], shapes: Shapes) -> dict[str, torch.Tensor]:
    left, right = products["weight"]
    ones = (1,) * (len(shapes[LORA_A]) - 2)
    a, b = right.flatten(0, 1), left.flatten(0, 1)
    return {LORA_A: a.view(-1, *shapes[LORA_A][1:]), LORA_B: b.view(*b.shape, *ones)}


CONVOLUTION = Layout(
    roles=(LORA_A, LORA_B),
    fault=_fault,
    rank=lambda shapes: shapes[LORA_A][0],
    norm=_norm,
    beside=(LORA_BIAS,),
    widths=lambda shapes: (shapes[LORA_A][1], shapes[LORA_B][0]),
    split=_split,
    join=_join,
)
"""A (R, I, K...) and B (O, R / G, 1...) of a convolution."""


class LoRAConv(Biased):
    """Mixin that adds low-rank updates to a convolution: ``y = host(x) + Σ s · B(A(x))``.

    A is a convolution with the host's kernel, stride, padding and dilation into R channels, B one
    with a kernel of 1 from there to the host's channels.
    """

    lora_layout = CONVOLUTION
    weight: Any

    @classmethod
    def lora_takes(cls, host: nn.Module) -> bool:
        """Say whether a module is one of PyTorch's convolutions."""
        return isinstance(host, _ConvNd)

    @classmethod
    def lora_fault(cls, host: nn.Module) -> str | None:
        """Return why a convolution cannot be adapted, or None."""
        name = type(host).__name__
        if isinstance(host, _ConvTransposeNd):
            return f"{name} is a transposed convolution, for which there is no low-rank update"
        kind = host_class(host)
        if kind.forward not in _FORWARDS:
            return f"{name} has a forward of its own, which may do something else than convolve"
        if not isinstance(host, Patched) and not has_float_weight(host):
            return f"the weight of this {name} is not there yet, or packed or quantized"
        if has_foreign_forward(host):
            return f"the forward of this {name} was replaced on the instance, which would hide LoRA"
        if not isinstance(host, Patched) and taken_names(host, DEFAULT, (LORA_A, LORA_B)):
            return f"{name} has a {LORA_A} already: another library's adapter is on it"
        return None

    @classmethod
    def lora_rank_fault(cls, host: nn.Module, r: int) -> str | None:
        """Return what is wrong with a rank: each group needs as much of it as the others."""
        assert isinstance(host, _ConvNd)
        most = min(host.in_channels * math.prod(host.kernel_size), host.out_channels)
        if r % host.groups:
            return f"r={r} cannot be shared equally by its {host.groups} groups"
        if r > most:
            return f"r={r} is larger than the most that its update can have, {most}"
        return None

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        assert isinstance(host, _ConvNd)
        ones = (1,) * len(host.kernel_size)
        return {
            LORA_A: (config.r, host.in_channels, *host.kernel_size),
            LORA_B: (host.out_channels, config.r // host.groups, *ones),
        }

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return how channels, kernels or groups differ, or None."""
        config = LayerConfig(r=shapes[LORA_A][0], alpha=1.0)
        here = cls.lora_shapes(host, config)
        if here != dict(shapes):
            return (
                f"the adapter has {LORA_A} {shapes[LORA_A]} and {LORA_B} {shapes[LORA_B]}, for "
                + (f"this layer they would be {here[LORA_A]} and {here[LORA_B]}")
            )
        return None

    @classmethod
    def lora_product_fault(cls, host: nn.Module) -> str | None:
        """Return why the weight cannot say what an update does, or None."""
        assert isinstance(host, _ConvNd)
        return None if host.groups == 1 else _GROUPED

    @classmethod
    def lora_products(
        cls, host: nn.Module, config: LayerConfig, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Product]:
        """Return the update of the weight, seen as (O, I·K)."""
        a, b = (tensors[role].flatten(1) for role in (LORA_A, LORA_B))
        return {"weight": product(a, b, config.scaling)} | bias_products(config, tensors)

    def lora_merge_fault(self) -> str | None:
        """Return why updates cannot be put into the weight, or None."""
        if self.groups != 1:  # type: ignore[comparison-overlap]
            return _GROUPED
        return super().lora_merge_fault()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the host's output plus every active adapter's update."""
        y = super().forward(input)
        for name, factor in self.lora_routing.now().live:
            config = self.lora_slots.get(name)
            if config is not None:
                x = F.dropout(input, config.dropout, self.training) if config.dropout else input
                y = y + self._update(x, name, config.scaling * factor).to(y.dtype)
        return self.lora_with_biases(y)

    def lora_as_output(self, bias: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return a bias as it is added to an output, which has positions after the channels."""
        return super().lora_as_output(bias, y).view(-1, *(1,) * len(self.kernel_size))  # type: ignore[arg-type]

    def _update(self, x: torch.Tensor, name: str, s: float) -> torch.Tensor:
        a, b = (to_local(factor) for factor in self.lora_pair(name))
        host: Any = self
        convolve = _FUNCTIONS[len(host.kernel_size)]
        padding = host.padding
        if host.padding_mode != "zeros":
            x, padding = F.pad(x, host._reversed_padding_repeated_twice, host.padding_mode), 0
        h = convolve(x, a.to(x.dtype), None, host.stride, padding, host.dilation)
        return convolve(h * s, b.to(x.dtype), None, groups=host.groups)


LoRAConv.lora_mixin = LoRAConv
