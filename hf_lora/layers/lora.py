"""What every patched layer shares: slots of adapters, the routing that chooses among them, forward.

A layer is patched in place by changing its class to a subclass of its own class
(``class LoRALinear(LoRALayer, nn.Linear)``), so that its parameters, keys and identity stay.
"""

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_lora.functional.fused import Update
from hf_lora.functional.init import init_low_rank
from hf_lora.functional.low_rank import delta_weight, low_rank, scaling
from hf_lora.layers.casting import sparing
from hf_lora.layers.dispatch import fused_forward, fused_on_top, is_ordinary, precomputed
from hf_lora.layers.host_first import HostFirst
from hf_lora.layers.instance_forward import rebind_forwards
from hf_lora.layers.meta import keep_values, refill, set_full
from hf_lora.layers.names import LORA_A, LORA_B, factor_names, parameter_name
from hf_lora.layers.offload import hide_from_offloading, show_to_offloading
from hf_lora.layers.routing import Routing, scales
from hf_lora.layers.tensor_parallel import (
    COMPUTES_LOCALLY,
    draws_apart,
    dropped,
    split_of,
    to_local,
)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One adapter's numbers on one layer."""

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor s of ``s · B A``."""
        return scaling(self.r, self.alpha, self.rslora)


OWN_FIELDS = frozenset(
    {"lora_routing", "lora_slots", "lora_copies", "lora_fresh", COMPUTES_LOCALLY}
)
"""What we keep in a patched module's ``__dict__``; all else there is the host's, by any name."""


class Patched(nn.Module):
    """A module whose class was swapped for a subclass of its own, and can be swapped back."""

    lora_host: type[nn.Module]
    """The class that the module had."""

    lora_mixin: type["Patched"]
    """The class of ours that was put in front of it."""

    lora_prefix = "LoRA"
    """What the names of such classes begin with."""

    lora_names: tuple[str, ...] = ()
    """The tensors that the class has properties for (trained copies only)."""

    lora_input = "input"
    """What the first argument of the host's forward is called, for calls by keyword."""

    lora_routing: Routing

    def lora_added(self) -> set[str]:
        """Return the names of the parameters and buffers that hf_lora added to this module."""
        raise NotImplementedError

    def lora_draw(self, names: set[str]) -> None:
        """Give added tensors that have new memory and no values some, so that none is garbage."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move or cast, but let no tensor of ours lose precision or come out as garbage."""
        kept = keep_values(self, fn)
        result = super()._apply(sparing(self, fn), *args, **kwargs)
        refill(self, kept)
        return result

    def _replicate_for_data_parallel(self) -> Any:
        """Have the replicas, which run in threads of their own, use what is used in this one."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["lora_routing"] = self.lora_routing.seen_here()
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by mixin and host: classes made at run time have no importable name."""
        return _rebuild, (self.lora_mixin, self.lora_host, self.lora_names), self.__getstate__()

    @classmethod
    def lora_fields(cls, host: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
        """Return what a subclass has beside the mixin's own, for tensors called ``names``."""
        return {}


@functools.cache
def patched_class(
    mixin: type[Patched], host: type[nn.Module], names: tuple[str, ...] = ()
) -> type[Patched]:
    """Return the one class that puts ``mixin`` in front of ``host``."""
    if vars(mixin).get("lora_host") is host:
        return mixin
    fields = {
        "__module__": __name__,
        "__doc__": mixin.__doc__,
        "lora_host": host,
        "lora_mixin": mixin,
        "lora_names": names,
        "lora_input": _first_argument(host),
    }
    fields |= mixin.lora_fields(host, names)
    return type(f"{mixin.lora_prefix}{host.__name__}", (mixin, host), fields)


def _rebuild(mixin: type[Patched], host: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    return object.__new__(patched_class(mixin, host, names))


def swap_class(module: nn.Module, cls: type[Patched], routing: Routing) -> None:
    """Turn ``module`` into an instance of ``cls``, in place."""
    host = type(module)
    module.__class__ = cls
    module.__dict__["lora_routing"] = routing
    routing.sharing.reconsider()
    rebind_forwards(module, module, host)
    if split_of(module) is not None:
        module.__dict__[COMPUTES_LOCALLY] = True
    hide_from_offloading(module)


def restore_class(module: Patched) -> None:
    """Give ``module`` the class that it had and leave nothing of ours behind."""
    patched = type(module)
    for key in OWN_FIELDS & module.__dict__.keys():
        del module.__dict__[key]
    module.__class__ = patched.lora_host  # type: ignore[assignment]
    rebind_forwards(module, module, patched)
    show_to_offloading(module)


def is_ours(module: nn.Module) -> bool:
    """Say whether the class of a patched module is still the one that hf_lora gave it."""
    return "lora_host" in vars(type(module))


_CONTAINERS = frozenset(k for k, v in vars(nn.Module()).items() if isinstance(v, (dict, set)))


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Give a new ``module`` the attributes of ``source``: same tensors, containers of its own."""
    for key, value in vars(source).items():
        module.__dict__[key] = copy.copy(value) if key in _CONTAINERS else value
    rebind_forwards(module, source, type(source))


def host_view(module: nn.Module) -> nn.Module:
    """Return a module of the host's class that shares every tensor and has nothing of LoRA."""
    host = module.lora_host if isinstance(module, Patched) else type(module)
    view = object.__new__(host)  # the host's own __new__ may want its arguments
    adopt(view, module)
    for key in OWN_FIELDS & view.__dict__.keys():
        del view.__dict__[key]
    for name in added_names(module):
        for store in (view._parameters, view._buffers):
            store.pop(name, None)
    return view


def added_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers that hf_lora added to ``module``."""
    return module.lora_added() if isinstance(module, Patched) else set()


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that a module itself holds under ``name``, past any property."""
    # not by get: TorchScript's store has none
    return next((tensor for held, tensor in module._parameters.items() if held == name), None)


def _first_argument(host: type[nn.Module]) -> str:
    try:
        names = list(inspect.signature(host.forward).parameters)
    except (TypeError, ValueError):  # written in C
        names = []
    return names[1] if len(names) > 1 else Patched.lora_input


class LoRALayer(Patched):
    """Mixin that adds low-rank updates to a linear-like host: ``y = host(x) + Σ s · (x Aᵀ) Bᵀ``."""

    lora_slots: dict[str, LayerConfig]
    """Adapter name to its numbers, for the adapters that this layer has."""

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
