"""What every patched module is: an instance of a class of ours, made of its own class.

A module is patched in place by changing its class to a subclass of the one that it has
(``class LoRALinear(LoRALayer, nn.Linear)``), so that its parameters, keys and identity stay.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_lora.compat.transformers import COMPUTES_LOCALLY
from hf_lora.layers.casting import sparing
from hf_lora.layers.meta import keep_values, refill
from hf_lora.layers.routing import Routing

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
