"""Kinds of layers that others than the package have registered for classes of modules."""

import collections
from collections.abc import Iterator

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_lora.errors import ConfigError, listing
from hf_lora.layers.kind import Adaptable, Patched, patched_class
from hf_lora.layers.roles import Layout

_ROWS: collections.OrderedDict[int, tuple[type[nn.Module], type[Adaptable]]]
_ROWS = collections.OrderedDict()

_WANTED = ("lora_shapes", "lora_fit_fault", "lora_add", "lora_remove", "lora_roles",
           "lora_tensors", "lora_is_at_start", "lora_merge_fault", "lora_merged")  # fmt: skip
"""What whole-model functions ask every kind of layer."""


def register_layer(host_class: type[nn.Module], layer_class: type[Adaptable]) -> RemovableHandle:
    """Have modules of a class adapted by a class of layers of your own.

    From then on ``plan``, ``wrap``, ``save``, ``load``, ``merge`` and everything else works for
    modules of ``host_class`` and its subclasses, also where they were adapted otherwise before.
    ``"all-linear"`` means them as well, where ``layer_class`` is a :class:`hf_lora.LoRALayer`. What
    was wrapped before stays as it is. A class that was registered later is asked first.

    A layer class goes in front of the host's in the classes of patched modules; ``super().forward``
    is the host's own. Where the host gives for each row of ``in`` numbers one of ``out`` numbers, a
    :class:`hf_lora.LoRALayer` only has to say how many these are. For anything else there are
    ``hf_lora.layers.factors.Factored`` (two factors of any shapes) and
    ``hf_lora.layers.kind.Adaptable`` (any tensors).

    Args:
        host_class: A class of modules, itself no adapted one.
        layer_class: What is put in front of it; defined where pickle can import it.

    Returns:
        A handle: ``handle.remove()``, or the end of a ``with`` block of it, takes the registration
        back. Layers that are patched then stay so; files of their kind are refused.

    Raises:
        ConfigError: One of the two is no such class, or lacks something; everything is named.

    Example:
        >>> import torch
        >>> import hf_lora
        >>> from torch import nn
        >>> class Project(nn.Module):
        ...     def __init__(self, wide, narrow):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(wide, narrow))
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> class LoRAProject(hf_lora.LoRALayer):
        ...     fan_in_fan_out = True  # the weight is (in, out)
        ...     @classmethod
        ...     def lora_widths(cls, host):
        ...         return tuple(host.weight.shape)
        >>> with hf_lora.register_layer(Project, LoRAProject):
        ...     model = hf_lora.wrap(nn.Sequential(Project(8, 6), nn.ReLU()), "0", r=2)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B']
    """
    problems = [*_host_faults(host_class), *_layer_faults(layer_class)]
    if not problems:
        try:
            patched_class(layer_class, host_class)
        except TypeError as error:
            problems.append(f"{layer_class.__name__} cannot stand in front of the host: {error}")
    if problems:
        raise ConfigError(listing("This layer cannot be registered", problems))
    handle = RemovableHandle(_ROWS)
    _ROWS[handle.id] = host_class, layer_class
    return handle


def registered(module: nn.Module) -> type[Adaptable] | None:
    """Return the class of layers that somebody has registered for a module, or None."""
    if not _ROWS:
        return None
    rows = reversed(_ROWS.values())
    return next((layer for host, layer in rows if isinstance(module, host)), None)


def all_registered() -> tuple[type[Adaptable], ...]:
    """Return every class of layers that is registered, the last first."""
    return tuple(layer for _, layer in reversed(_ROWS.values()))


def _host_faults(host_class: object) -> Iterator[str]:
    if not isinstance(host_class, type) or not issubclass(host_class, nn.Module):
        yield f"host_class: {host_class!r} is no class of modules"
    elif issubclass(host_class, Patched):
        yield f"host_class: {host_class.__name__} is a class of adapted layers already"
    elif host_class is nn.Module:
        yield "host_class: nn.Module is what every module is; name the class that is meant"


def _layer_faults(layer_class: object) -> Iterator[str]:
    if not isinstance(layer_class, type) or not issubclass(layer_class, Adaptable):
        yield (
            f"layer_class: {layer_class!r} is no class of layers; derive it from "
            "hf_lora.LoRALayer, hf_lora.layers.factors.Factored or hf_lora.layers.kind.Adaptable"
        )
        return
    name = layer_class.__name__
    for method in _WANTED:
        if next(cls for cls in layer_class.__mro__ if method in vars(cls)) in (Adaptable, Patched):
            yield f"layer_class: {name} does not define {method}"
    if layer_class.forward is nn.Module.forward:
        yield f"layer_class: {name} does not define forward, so that an update would have no effect"
    if not isinstance(getattr(layer_class, "lora_layout", None), Layout):
        yield f"layer_class: {name} has no lora_layout, which says how files hold its tensors"
