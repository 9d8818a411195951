"""Another adapter in the place of one: under its name, in its place, in use where that was."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from hf_lora.errors import StateError
from hf_lora.layers.roles import Place
from hf_lora.model.adapter import Adapter
from hf_lora.model.choices import check_compatible
from hf_lora.model.patch import attach, remove_adapter
from hf_lora.model.registry import Registry


def check_replaceable(registry: Registry, name: str) -> None:
    """Raise StateError if an adapter's tensors are inside the weights, or somebody is using them.

    Raises:
        UnknownAdapterError: There is none of that name.
    """
    registry.adapter(name)
    registry.check_unmerged("replace an adapter", (name,))
    if registry.routing.used_elsewhere((name,)):
        raise StateError(
            f"Another thread or task uses {name} now, in a use_adapter block; replace an adapter "
            "when nobody does."
        )


@contextlib.contextmanager
def replaced(model: nn.Module, registry: Registry, name: str) -> Iterator[None]:
    """Take an adapter off while, in the ``with`` block, another is attached under its name.

    The new one has its place in the order, and is in use where the old one was. After an error the
    old one is back, with the very tensors that it had.
    """
    check_replaceable(registry, name)
    old, order = registry.adapter(name), list(registry.adapters)
    tensors = {(path, role): tensor for path, _, role, tensor in registry.tensors(name)}
    held = list(registry.buffers.held(name))
    chosen = {registry.routing.standing.chosen, registry.routing.now().chosen}
    with registry.routing.unchanged():
        remove_adapter(registry, name)
        try:
            yield
            for each in chosen:
                check_compatible(registry, each, registry.routing.standing.merged)
        except BaseException:
            _bring_back(model, registry, old, tensors)
            for each in held:
                registry.buffers.give(registry, old.name, *each)
            raise
        finally:
            for each in order:
                registry.adapters[each] = registry.adapters.pop(each)


def _bring_back(
    model: nn.Module, registry: Registry, old: Adapter, tensors: dict[Place, torch.Tensor]
) -> None:
    if old.name in registry.adapters:
        remove_adapter(registry, old.name)
    attach(
        model,
        registry,
        old.name,
        old.config,
        old.slots,
        list(old.trained),
        ties=old.ties,
        biases=old.biases,
        rows=old.rows,
    )
    for path, module, role in list(registry.roles(old.name)):
        tensor = tensors[path, role.name]
        if isinstance(tensor, nn.Parameter):
            module._parameters[role.held] = tensor
        else:
            module._buffers[role.held] = tensor
    registry.adapters[old.name] = old
    registry.retie(old.name)
