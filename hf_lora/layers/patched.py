"""Patching a module in place, and taking the patch off again: only its class changes."""

import copy

from torch import nn

from hf_lora.compat.transformers import COMPUTES_LOCALLY
from hf_lora.layers.instance_forward import rebind_forwards
from hf_lora.layers.kind import OWN_FIELDS, Patched, added_names
from hf_lora.layers.names import HELD
from hf_lora.layers.offload import hide_from_offloading, show_to_offloading
from hf_lora.layers.routing import Routing
from hf_lora.layers.tensor_parallel import split_of


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
    for key in {*OWN_FIELDS, HELD} & view.__dict__.keys():
        del view.__dict__[key]
    for name in added_names(module):
        for store in (view._parameters, view._buffers):
            store.pop(name, None)
    return view
