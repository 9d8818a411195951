"""The one table of the kinds of layers that targets can mean, and of their classes."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.kinds.conv import LoRAConv
from hf_lora.kinds.embedding import LoRAEmbedding
from hf_lora.kinds.experts import LoRAExperts
from hf_lora.kinds.linear import LoRAConv1D, LoRALinear
from hf_lora.kinds.lora import LoRALayer
from hf_lora.kinds.reading import LoRAAttention, OutProjection, ReadLinear
from hf_lora.layers.kind import Adaptable, patched_class
from hf_lora.layers.probe import host_class
from hf_lora.layers.reading import Read
from hf_lora.layers.registered import all_registered, registered
from hf_lora.layers.roles import Layout

KINDS: tuple[type[Adaptable], ...] = (
    LoRALayer,
    LoRAConv,
    LoRAEmbedding,
    LoRAExperts,
    LoRAAttention,
)
"""Those that a module is asked for, in this order."""

_TABLE: tuple[tuple[type[nn.Module], type[Adaptable]], ...] = (
    (nn.Linear, LoRALinear),
    (Conv1D, LoRAConv1D),
)
"""Classes of hosts that have a class of their own."""


def kind_of(module: nn.Module) -> type[Adaptable] | None:
    """Return the kind of layer that a module is, patched or not; None if it is of none."""
    if isinstance(module, Adaptable):  # as it was adapted, whatever is registered since
        kinds = (*all_registered(), *KINDS)
        return next((kind for kind in kinds if isinstance(module, kind)), module.lora_mixin)  # type: ignore[return-value]
    return registered(module) or next((kind for kind in KINDS if kind.lora_takes(module)), None)


def layer_class(module: nn.Module, read: Read = Read.NO) -> type[Adaptable]:
    """Return the class that adapts a module of some kind, and whose weight others may read.

    Subclasses of a listed host get a subclass of its layer class, so that a 4-bit linear layer
    still is a ``LoRALinear``; any other host gets its kind's mixin in front of it.
    """
    host, kind = host_class(module), kind_of(module)
    assert kind is not None
    if kind not in KINDS:
        return patched_class(kind, type(module))  # type: ignore[return-value]
    if read is not Read.NO:
        return patched_class(OutProjection if read is Read.ALWAYS else ReadLinear, type(module))  # type: ignore[return-value]
    known = next((layer for listed, layer in _TABLE if issubclass(host, listed)), kind)
    made = patched_class(known if issubclass(known, kind) else kind, type(module))
    assert issubclass(made, Adaptable)
    return made


def host_fault(module: nn.Module) -> str | None:
    """Return why targets cannot mean a module, or None if they can."""
    kind = kind_of(module)
    if kind is None:
        name = type(module).__name__
        return f"{name} is no linear layer, convolution, embedding, attention or stack of experts"
    return kind.lora_fault(module)


def layouts() -> tuple[Layout, ...]:
    """Return how files hold the tensors of each kind."""
    return tuple(dict.fromkeys(kind.lora_layout for kind in (*all_registered(), *KINDS)))
