"""Layers whose weights others read, past the layers' own forward.

``nn.MultiheadAttention`` hands its weights, and those of its ``out_proj``, to a function, and
``nn.TransformerEncoderLayer`` in eval mode hands all of its layers' to a kernel. An update reaches
these only if a name reads as the sum of the base's weight and the updates. The base's Parameter
stays where it is, and is not written.
"""

import contextlib
import dataclasses
import enum
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hf_lora.compat.dtensor import is_sharded
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.probe import is_plain
from hf_lora.layers.trained import stored

OUT = "out_proj"
"""What the last layer of an ``nn.MultiheadAttention`` is called in it."""

_HIDDEN = ("linear1", "linear2")
_LOCAL = threading.local()


def is_attention(module: nn.Module) -> bool:
    """Say whether a module is PyTorch's attention, and not one that calls layers of its own."""
    # torch.ao's quantizable one, a subclass, has plain linear layers and calls them
    last = module._modules.get(OUT) if isinstance(module, nn.MultiheadAttention) else None
    return isinstance(last, NonDynamicallyQuantizableLinear)


class Read(enum.Enum):
    """Whether others read a layer's weight instead of calling it."""

    NO = enum.auto()
    SOMETIMES = enum.auto()
    ALWAYS = enum.auto()


def read_of(path: str, modules: Mapping[str, nn.Module]) -> Read:
    """Return whether the weight of the layer at a path is read, in a way that updates can follow.

    Args:
        path: The layer's.
        modules: Path to module, for all of the model.
    """
    above, _, name = path.rpartition(".")
    parent = modules.get(above) if path else None
    if name == OUT and parent is not None and is_attention(parent):
        return Read.ALWAYS
    encoder = name in _HIDDEN and isinstance(parent, nn.TransformerEncoderLayer)
    return Read.SOMETIMES if encoder and is_plain(modules[path]) else Read.NO


def out_projections(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return those of the paths that are the last layer of an attention, each to that one's."""
    found = (path for path in paths if read_of(path, modules) is Read.ALWAYS)
    return {path: path.rpartition(".")[0] for path in found}


def out_slot(config: LayerConfig) -> LayerConfig:
    """Return the numbers of the last layer of an attention that has these.

    PEFT (seen with 0.21) puts the update of that layer in twice, in each forward and in a merge, so
    that its files mean twice the strength there.
    """
    return dataclasses.replace(config, alpha=2 * config.alpha)


def reader(name: str, updated: Callable[[Any, torch.Tensor], torch.Tensor]) -> property:
    """Return a property that reads as a tensor of the base with the updates of those in use.

    Args:
        name: The tensor's.
        updated: Called with the module and the base's tensor.
    """

    def read(self: nn.Module) -> Any:
        own = parameter_of(self, name)
        if own is None and name not in self.__dict__:
            return None
        if is_sharded(own):  # FSDP2 asks for its part; in a forward, whole tensors stand there
            return own
        known = getattr(_LOCAL, "known", None)
        if known is None or torch.compiler.is_compiling():
            return updated(self, stored(self, name))
        key = id(self), name
        if key not in known:
            known[key] = updated(self, stored(self, name))
        return known[key]

    def write(self: nn.Module, value: torch.Tensor) -> None:
        # only the replicas of nn.DataParallel keep tensors as plain attributes
        self.__dict__[name] = value

    return property(read, write)


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Have each weight computed once inside, however often it is read by this thread."""
    before = getattr(_LOCAL, "known", None)
    _LOCAL.known = {}
    try:
        yield
    finally:
        _LOCAL.known = before
