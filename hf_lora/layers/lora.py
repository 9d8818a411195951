"""Low-rank updates on a linear-like layer: its adapters' factors, and the forward with them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_lora.functional.fused import Update
from hf_lora.functional.init import init_low_rank
from hf_lora.functional.low_rank import delta_weight, low_rank
from hf_lora.layers.dispatch import fused_forward, fused_on_top, is_ordinary, precomputed
from hf_lora.layers.host_first import HostFirst
from hf_lora.layers.kind import Patched
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.meta import set_full
from hf_lora.layers.names import LORA_A, LORA_B, factor_names, parameter_name
from hf_lora.layers.patched import host_view
from hf_lora.layers.routing import scales
from hf_lora.layers.tensor_parallel import draws_apart, dropped, to_local


class LoRALayer(Patched):
    """Mixin that adds low-rank updates to a linear-like host: ``y = host(x) + Σ s · (x Aᵀ) Bᵀ``."""

    lora_slots: dict[str, LayerConfig]
    """Adapter name to its numbers, for the adapters that this layer has."""

    weight: Any
    bias: Any
    """The host's own: whatever it keeps there."""

    fan_in_fan_out = False
    """Whether the host keeps its weight as (in, out)."""

    def lora_features(self) -> tuple[int, int]:
        """Return (in, out) as the host declares them; its weight may be packed or sharded."""
        return int(self.in_features), int(self.out_features)  # type: ignore[arg-type]

    def lora_add(
        self,
        name: str,
        slot: LayerConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        init: str | None,
    ) -> None:
        """Give the layer the factors of adapter ``name``; ``init=None`` leaves them unfilled."""
        in_features, out_features = self.lora_features()
        a_RI = nn.Parameter(torch.empty(slot.r, in_features, dtype=dtype, device=device))
        b_OR = nn.Parameter(torch.empty(out_features, slot.r, dtype=dtype, device=device))
        if init is not None:
            init_low_rank(a_RI, b_OR, init)
        for kind, factor in ((LORA_A, a_RI), (LORA_B, b_OR)):
            # transformers initializes again whatever does not carry this mark
            factor._is_hf_initialized = True  # type: ignore[attr-defined]
            self.register_parameter(parameter_name(kind, name), factor)
            # accelerate's init_empty_weights has put another there, without values
            self._parameters[parameter_name(kind, name)] = factor
        self.lora_slots[name] = slot
        self.lora_routing.starts[name] = init or "kaiming"
        self.lora_routing.names.add(name)
        self.lora_routing.factors[name] = factor_names(name)

    def lora_draw(self, names: set[str]) -> None:
        """Draw factors anew: as they started, since what they were is lost."""
        for adapter, slot in self.lora_slots.items():
            keys = [parameter_name(kind, adapter) for kind in (LORA_A, LORA_B)]
            if names & set(keys):
                in_features, out_features = self.lora_features()
                drawn = torch.empty(slot.r, in_features), torch.empty(out_features, slot.r)
                init_low_rank(*drawn, self.lora_routing.starts[adapter])
                for key, factor, value in zip(keys, self.lora_pair(adapter), drawn, strict=True):
                    if key in names:
                        set_full(factor, value)

    def lora_remove(self, name: str) -> None:
        """Take the factors of adapter ``name`` away."""
        del self.lora_slots[name]
        for kind in (LORA_A, LORA_B):
            delattr(self, parameter_name(kind, name))

    def lora_pair(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A (r, in) and B (out, r) of adapter ``name``."""
        key_a, key_b = self.lora_routing.factors.get(name) or factor_names(name)
        a_RI, b_OR = self._parameters.get(key_a), self._parameters.get(key_b)
        if a_RI is None or b_OR is None:  # the replicas of nn.DataParallel keep plain attributes
            return getattr(self, key_a), getattr(self, key_b)
        return a_RI, b_OR

    def lora_delta(self, name: str) -> torch.Tensor:
        """Return adapter ``name``'s update of the weight, float32, in the weight's own layout."""
        delta_OI = delta_weight(*self.lora_pair(name), self.lora_slots[name].scaling)
        return delta_OI.t() if self.fan_in_fan_out else delta_OI

    def lora_added(self) -> set[str]:
        """Return the names of the factors that this layer has."""
        return {parameter_name(kind, name) for name in self.lora_slots for kind in (LORA_A, LORA_B)}

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the host's output plus every active adapter's update."""
        if (
            torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and self.lora_routing.number
        ):
            return self.lora_gated(*args, **kwargs)
        x: Any = args[0] if args else kwargs.get(self.lora_input)
        ordinary = not self.lora_routing.plain and is_ordinary(x)
        alone = len(args) + len(kwargs) == 1
        ready = precomputed(self, x) if ordinary and alone else None
        if ready is not None:
            return ready
        updates = self.lora_updates()
        if not updates:
            return super().forward(*args, **kwargs)
        ordinary &= not draws_apart(self, (update.dropout for update in updates))
        if ordinary and alone:
            y = fused_forward(self, updates, x)
            if y is not None:
                return y
        y = super().forward(*args, **kwargs)
        whole = fused_on_top(self, updates, x, y) if ordinary else None
        if whole is not None:
            return whole
        for a_RI, b_OR, s, dropout in updates:
            seen = dropped(self, x, dropout) if dropout else x
            y = y + low_rank(seen, a_RI, b_OR, s).to(y.dtype)
        return y

    def lora_gated(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute every adapter's update and let those of the active ones through.

        For compiled inference: what is in use is read from a tensor, so that a graph serves all.
        """
        y = super().forward(*args, **kwargs)
        x: Any = args[0] if args else kwargs.get(self.lora_input)
        factors = scales(self.lora_routing, [*self.lora_slots], y.device)
        for (name, slot), factor in zip(self.lora_slots.items(), factors, strict=True):
            seen = F.dropout(x, slot.dropout, self.training)
            update = low_rank(seen, *_here(self, name), slot.scaling).to(y.dtype)
            y = y + torch.where(factor != 0, update * factor, 0.0)
        return y

    def lora_updates(self) -> list[Update]:
        """Return the updates of the active adapters, as things are at this moment."""
        training = self.training
        return [
            Update(*_here(self, name), slot.scaling * factor, slot.dropout if training else 0.0)
            for name, factor in self.lora_routing.now().live
            if (slot := self.lora_slots.get(name)) is not None
        ]

    @HostFirst
    def r(self) -> int:
        """Rank of the active adapter."""
        return _shown(self)[0].r

    @HostFirst
    def alpha(self) -> float:
        """Strength of the active adapter."""
        return _shown(self)[0].alpha

    @HostFirst
    def scaling(self) -> float:
        """The factor that the active adapter's update is multiplied by."""
        slot, factor = _shown(self)
        return slot.scaling * factor

    @HostFirst
    def base(self) -> nn.Module:
        """The frozen layer on its own: the host's class on the same parameters, without LoRA."""
        return host_view(self)

    def extra_repr(self) -> str:
        """Show the host's own line, then each adapter's rank and strength."""
        shown = ", ".join(f"{n}: r={s.r}, alpha={s.alpha:g}" for n, s in self.lora_slots.items())
        return ", ".join(filter(None, (super().extra_repr(), f"lora=({shown})")))


def _here(layer: LoRALayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what this process has of A and B of adapter ``name``."""
    a_RI, b_OR = layer.lora_pair(name)
    return to_local(a_RI), to_local(b_OR)


def _shown(layer: LoRALayer) -> tuple[LayerConfig, float]:
    """Return the numbers of the first active adapter that the layer has, else of its first.

    And what its update is multiplied by beside them.
    """
    for name, factor in (*layer.lora_routing.now().chosen, *((n, 1.0) for n in layer.lora_slots)):
        if name in layer.lora_slots:
            return layer.lora_slots[name], factor
    raise AttributeError("this layer has no adapter")


LoRALayer.lora_mixin = LoRALayer
