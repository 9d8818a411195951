"""LoRA on ``nn.Linear`` and its subclasses, and on transformers' transposed ``Conv1D``."""

from typing import Any, Self

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.compat.accelerate import execution_device, is_offloaded, is_on_meta
from hf_lora.config import LoRAConfig
from hf_lora.errors import StateError, TargetError
from hf_lora.kinds.lora import LoRALayer
from hf_lora.layers.hosts import adapter_dtype, rank_fault, why_not
from hf_lora.layers.kind import patched_class
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import DEFAULT
from hf_lora.layers.patched import adopt
from hf_lora.layers.routing import Routing


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer with a low-rank update: ``y = x Wᵀ + bias + alpha/r · (x Aᵀ) Bᵀ``.

    Built directly, it shares the Parameters of ``base``, which it freezes; :func:`hf_lora.wrap`
    turns a model's own layers into this class instead, without building anything.

    Args:
        base: The layer to adapt, with a weight of shape (out, in).
        r: Rank, at least 1 and at most the smaller of in and out.
        alpha: Strength; the update is scaled by ``alpha / r``.

    Attributes:
        lora_A: Shape (r, in), starts uniform in ±1/sqrt(in).
        lora_B: Shape (out, r), starts at zero, so that the layer begins as ``base``.
        base: The frozen layer alone, sharing every tensor.

    Raises:
        ConfigError: ``r`` or ``alpha`` is out of range.
        TargetError: ``base`` cannot be adapted, or is smaller than ``r``.
        StateError: ``base`` has an adapter already.

    Example:
        >>> LoRALinear(nn.Linear(3, 2), r=1).lora_A.shape
        torch.Size([1, 3])
    """

    lora_host = nn.Linear
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __new__(cls, base: nn.Linear | None = None, *args: Any, **kwargs: Any) -> Self:
        """Make an instance of the subclass that fits the host's own class."""
        fits = isinstance(base, nn.Linear) and not isinstance(base, LoRALayer)
        return object.__new__(patched_class(cls, type(base)) if fits else cls)  # type: ignore[arg-type]

    def __init__(self, base: nn.Linear, r: int, alpha: float = 16.0):
        config = LoRAConfig(targets=".*", r=r, alpha=alpha)
        if isinstance(base, LoRALayer):
            raise StateError("This layer has an adapter already; pass layer.base to begin anew.")
        fault = why_not(base) if isinstance(base, nn.Linear) else f"{base!r} is not an nn.Linear"
        fault = fault or rank_fault(base, config.r)
        if fault:
            raise TargetError(f"LoRALinear cannot adapt this layer: {fault}.")
        if is_on_meta(base) or is_offloaded(base):
            raise StateError("This layer's weights are not in memory; load them first.")
        adopt(self, base)
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.lora_slots: dict[str, LayerConfig] = {}
        self.lora_routing = Routing(((DEFAULT, 1.0),))
        self.lora_add(
            DEFAULT,
            LayerConfig(r=config.r, alpha=config.alpha),
            dtype=adapter_dtype(base),
            device=execution_device(base),
            init=config.init,
        )


class LoRAConv1D(LoRALayer, Conv1D):
    """GPT-2's linear layer, whose weight is kept as (in, out), with a low-rank update."""

    lora_host = Conv1D
    lora_input = "x"
    fan_in_fan_out = True

    @classmethod
    def lora_widths(cls, host: nn.Module) -> tuple[int, int]:
        """Return (in, out) under the names that this host gives them."""
        return int(host.nx), int(host.nf)  # type: ignore[arg-type]


LoRALinear.lora_mixin = LoRALinear
LoRAConv1D.lora_mixin = LoRAConv1D
