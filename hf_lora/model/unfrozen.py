"""Parameters of the base that somebody unfroze beside an adapter: what trains is what is saved.

Their modules become trained modules of the adapter. The Parameter that was unfrozen becomes the
adapter's copy, because an optimizer may hold it, and the base keeps its values under another one
until the adapter goes.
"""

from collections.abc import Iterator

import torch
from torch import nn

from hf_lora.compat.accelerate import is_offloaded
from hf_lora.compat.dtensor import is_distributed
from hf_lora.errors import StateError, listing
from hf_lora.layers.holding import held_by
from hf_lora.layers.kind import Adaptable
from hf_lora.layers.trained import TrainedModule, own_parameters, tensor_names, train_fault
from hf_lora.model.patch import train_module
from hf_lora.model.registry import Adopted, Registry
from hf_lora.targets import inside

Found = dict[str, dict[str, nn.Parameter]]
"""Path of a module to those of its parameters that were unfrozen."""


def adopt_unfrozen(model: nn.Module, registry: Registry) -> None:
    """Make trained modules of an active adapter of what was unfrozen of the base since.

    Raises:
        StateError: A file of an adapter cannot hold it; each is named, and nothing has changed.
    """
    found = _unfrozen(model, registry)
    if not found:
        return
    modules = dict(model.named_modules())
    problems = [
        f"{path}.{name}: {fault}" if path else f"{name}: {fault}"
        for path, tensors in found.items()
        for name, parameter in tensors.items()
        if (fault := _fault(path, modules[path], parameter))
    ]
    name = _adapter(registry)
    if name is None:
        problems = [f"{path}: no adapter is in use that could hold it" for path in found]
    if problems:
        raise StateError(
            listing(
                "These parameters of the base were unfrozen, and the file of an adapter cannot "
                "hold them",
                problems,
                "Freeze them again (requires_grad_(False)), or name whole modules in train=[...] "
                "when you wrap.",
            )
        )
    assert name is not None
    adapter = registry.adapter(name)
    kept: dict[int, nn.Parameter] = {}
    tops = [path for path in found if not inside(path.rpartition(".")[0], found.keys())]
    for top in tops:
        for below, part in modules[top].named_modules():
            if tensor_names(part):
                path = f"{top}.{below}" if below else top
                _adopt(registry, name, path, part, found.get(path, {}), kept)
    trained = [*adapter.trained, *tops]
    adapter.trained = tuple(path for path in modules if path in trained)


def _unfrozen(model: nn.Module, registry: Registry) -> Found:
    def base() -> Iterator[tuple[str, str, nn.Parameter]]:
        for path, module in model.named_modules():
            # of a module with copies the base's own are not read
            if path not in registry.exclusive:
                for name, parameter in own_parameters(module):
                    if parameter.requires_grad:
                        yield path, name, parameter

    found: Found = {}
    for path, name, parameter in base():
        found.setdefault(path, {})[name] = parameter
    return found


def _adapter(registry: Registry) -> str | None:
    """Return the adapter that holds what is unfrozen: the first in use that trains."""
    active = registry.routing.active
    trains = [n for n in active if any(p.requires_grad for _, p in registry.parameters(n))]
    return next(iter([*trains, *active]), None)


def _fault(path: str, module: nn.Module, parameter: nn.Parameter) -> str | None:
    if not path:
        return "it belongs to the model itself, and only modules inside of it have a name there"
    if is_distributed(parameter):
        return "it is spread over several processes already"
    for part in module.modules():
        if isinstance(part, Adaptable):
            return "its layer has a low-rank update" if part is module else "so has a layer in it"
        if is_offloaded(part):
            return "accelerate keeps its values elsewhere between calls"
        fault = train_fault(part)
        if fault:
            return fault
    return None


@torch.no_grad()
def _adopt(
    registry: Registry,
    name: str,
    path: str,
    module: nn.Module,
    unfrozen: dict[str, nn.Parameter],
    kept: dict[int, nn.Parameter],
) -> None:
    """Give an adapter its copies of a module; what is tied stays so, on both sides."""
    held = held_by(module, name)
    registry.buffers.drop_from(module, name)
    copies: TrainedModule = train_module(registry, name, path, module)
    for role, tensor in held.items():
        copies._buffers[copies.lora_copies[name][role]] = tensor
    registry.buffers.reclass()
    for role, added in copies.lora_copies[name].items():
        own, copied = copies._parameters.get(role), copies._parameters.get(added)
        if own is None or copied is None:
            continue
        if role not in unfrozen:
            copied.requires_grad = False
            continue
        if id(own) not in kept:
            kept[id(own)] = nn.Parameter(own.detach().clone(), requires_grad=False)
            vars(kept[id(own)]).update(vars(own))
        copies._parameters[role], copies._parameters[added] = kept[id(own)], own
        registry.adopted.append(Adopted(name, copies, role, own))
