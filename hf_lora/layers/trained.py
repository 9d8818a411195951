"""Modules trained in full beside an adapter, such as a fresh head: copies instead of the originals.

The base's own parameters stay where they are, with their names and values. Reading ``weight`` gives
the active adapter's copy, whoever reads it (the module's own forward, or code outside that
uses ``model.lm_head.weight``), because the swapped class has a property of that name.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_lora.layers.base import Patched
from hf_lora.layers.names import copy_kind, parameter_name


class TrainedModule(Patched):
    """Mixin whose parameters and persistent buffers read as the active adapter's own copies."""

    lora_prefix = "Trained"

    lora_copies: dict[str, dict[str, str]]
    """Adapter to (name of a tensor to the name of the adapter's copy of it)."""

    @classmethod
    def lora_fields(cls, names: tuple[str, ...]) -> dict[str, Any]:
        """Return one property for each tensor of the module."""
        return {name: property(_reader(name)) for name in names}

    def lora_add_copy(self, adapter: str) -> None:
        """Give ``adapter`` its own copy of each of the module's tensors, equal to the base's."""
        copies: dict[str, str] = {}
        for name, tensor in own_tensors(self, self.lora_names):
            added = parameter_name(copy_kind(name), adapter)
            data = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                parameter = nn.Parameter(data, requires_grad=data.is_floating_point())
                # transformers initializes again whatever does not carry this mark
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                self.register_parameter(added, parameter)
            else:
                self.register_buffer(added, data)
            copies[name] = added
        self.lora_copies[adapter] = copies

    def lora_remove_copy(self, adapter: str) -> None:
        """Take the copies of ``adapter`` away."""
        for added in self.lora_copies.pop(adapter).values():
            delattr(self, added)

    def lora_copy(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return name to copy, for one adapter."""
        return {name: _stored(self, added) for name, added in self.lora_copies[adapter].items()}


def tensor_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors that a module owns itself and that a checkpoint holds."""
    parameters = [name for name, tensor in module._parameters.items() if tensor is not None]
    hidden = module._non_persistent_buffers_set
    buffers = [
        name
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in hidden
    ]
    return (*parameters, *buffers)


def own_tensors(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the module's own tensors of these names, never an adapter's copy."""
    for name in names:
        yield name, _stored(module, name)


def _stored(module: nn.Module, name: str) -> torch.Tensor:
    tensor = module._parameters.get(name)
    if tensor is None:
        tensor = module._buffers[name]
    assert tensor is not None
    return tensor


def _reader(name: str) -> Any:
    def read(self: TrainedModule) -> torch.Tensor:
        routing = self.lora_routing
        if not routing.merged:
            for adapter in routing.active:
                copies = self.lora_copies.get(adapter)
                if copies is not None:
                    return _stored(self, copies[name])
        return _stored(self, name)

    return read


TrainedModule.lora_mixin = TrainedModule
