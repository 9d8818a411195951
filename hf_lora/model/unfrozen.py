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
from hf_lora.kinds.token_rows import TrainedRows
from hf_lora.layers.holding import held_by
from hf_lora.layers.kind import Adaptable
from hf_lora.layers.trained import (
    TrainedModule,
    own_parameters,
    parts_with_tensors,
    tensor_names,
    train_fault,
)
from hf_lora.model.adopted import Adopted
from hf_lora.model.patch import train_module
from hf_lora.model.registry import Registry
from hf_lora.model.transaction import Transaction
from hf_lora.planning.ties import Owners
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
    with Transaction(model) as change:
        adapter = registry.adapter(name)
        kept: dict[int, nn.Parameter] = {}
        tops = [path for path in found if not inside(path.rpartition(".")[0], found.keys())]
        ties = Owners(model, registry.adapted().stood).ties(tops)
        unfrozen = {(path, role) for path, tensors in found.items() for role in tensors}
        own = {p: first for p, first in ties.items() if first in unfrozen}
        adapter.ties = {**adapter.ties, **own}
        for top in tops:
            for path, part in parts_with_tensors(modules[top], top):
                _adopt(registry, name, path, part, found.get(path, {}), kept)
        registry.retie(name)
        trained = [*adapter.trained, *tops]
        adapter.trained = tuple(path for path in modules if path in trained)
        change.commit()


def _unfrozen(model: nn.Module, registry: Registry) -> Found:
    def base() -> Iterator[tuple[str, str, nn.Parameter]]:
        for path, module in model.named_modules():
            # of what has copies the base's own is not read
            copied = module.lora_copied() if isinstance(module, TrainedModule) else ()
            for name, parameter in own_parameters(module):
                if parameter.requires_grad and name not in copied:
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
        if isinstance(part, TrainedRows):
            return "some rows of it are trained"
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
    before = module.lora_copied(name) if isinstance(module, TrainedModule) else ()
    new = [role for role in tensor_names(module) if role not in before]
    copies: TrainedModule = train_module(registry, name, path, module, new)
    for role, tensor in held.items():
        copies._buffers[copies.lora_copies[name][role]] = tensor
    registry.buffers.reclass()
    for role in new:
        # a tied tensor has none here: it will read that of the first, which is this very Parameter
        added = copies.lora_copies[name].get(role)
        own = copies._parameters.get(role)
        if own is None:
            continue
        if role not in unfrozen:
            if added is not None:
                copies._parameters[added].requires_grad = False  # type: ignore[union-attr]
            continue
        if id(own) not in kept:
            kept[id(own)] = nn.Parameter(own.detach().clone(), requires_grad=False)
            vars(kept[id(own)]).update(vars(own))
        copies._parameters[role] = kept[id(own)]
        if added is not None:
            copies._parameters[added] = own
        registry.adopted.append(Adopted(name, copies, role, own))
