"""Normalizations with running statistics: where nothing of them trains, these stay as they are.

PyTorch's normalize by the batch, and move what they hold, whenever their module is in training
mode. In a frozen base that would change the base in silence: what an adapter was trained on would
be saved nowhere. So one that does not train says that it is not in training mode, whoever asks.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from hf_lora.layers.kind import Patched, parameter_of


def has_statistics(module: nn.Module) -> bool:
    """Say whether a module is a normalization of PyTorch's that moves running statistics."""
    return (
        isinstance(module, _NormBase)
        and not isinstance(module, LazyModuleMixin)  # changes its class itself when it is first run
        and module.track_running_stats
        and module._buffers.get("running_mean") is not None
    )


def training_if(trains: Callable[[Any], bool]) -> property:
    """Return the attribute ``training`` of a class that is in training mode only if it trains.

    The mode that was set is kept, and is what is left when the class is swapped back.
    """

    def read(self: nn.Module) -> bool:
        return self.__dict__["training"] and trains(self)

    def write(self: nn.Module, mode: bool) -> None:
        self.__dict__["training"] = mode

    return property(read, write)


class FrozenNorm(Patched):
    """Mixin for a normalization that uses the statistics it has, and leaves them alone."""

    lora_prefix = "Frozen"

    @classmethod
    def lora_fields(cls, host: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
        """Return the attribute by which the host's forward knows what it is to do."""
        return {"training": training_if(_is_unfrozen)}

    def lora_adapters(self) -> tuple[str, ...]:
        """Return none: the module has no tensors but the base's."""
        return ()

    def lora_draw(self, names: set[str]) -> None:
        """Do nothing, as there is nothing that was added."""


def _is_unfrozen(module: nn.Module) -> bool:
    """Say whether somebody has unfrozen the base's own scale or shift since."""
    own = (parameter_of(module, name) for name in module._parameters)
    return any(parameter is not None and parameter.requires_grad for parameter in own)


FrozenNorm.lora_mixin = FrozenNorm
