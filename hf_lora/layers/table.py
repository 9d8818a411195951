"""The one table from a host's class to the layer class that adapts it."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.layers.kind import Patched, patched_class
from hf_lora.layers.linear import LoRAConv1D, LoRALinear
from hf_lora.layers.lora import LoRALayer

_TABLE: tuple[tuple[type[nn.Module], type[LoRALayer]], ...] = (
    (nn.Linear, LoRALinear),
    (Conv1D, LoRAConv1D),
)


def layer_class(host: type[nn.Module]) -> type[Patched]:
    """Return the class that adapts hosts of class ``host``.

    Subclasses of a listed host get a subclass of its layer class, so that a 4-bit linear layer
    still is a ``LoRALinear``; any other class with ``in_features`` and ``out_features`` gets the
    mixin in front of it.
    """
    for known, layer in _TABLE:
        if issubclass(host, known):
            return patched_class(layer, host)
    return patched_class(LoRALayer, host)
