"""A wrapped model once more, as a model object of its own on the same tensors."""

import copy
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.owner import holder_of, settled
from hf_lora.compat.dtensor import gather_full, has_distributed_parameters
from hf_lora.errors import StateError
from hf_lora.integrations.own_methods import uninstall
from hf_lora.layers.patched import restore_class
from hf_lora.layers.routing import Routing
from hf_lora.layers.trained import own_tensors
from hf_lora.model.patch import remove_adapter
from hf_lora.model.registry import Registry, pop_registry, wrapped

_DEPTH = 4
"""A module's fields, an object or dict among them, and one more inside (double quantization)."""


def base_view(model: nn.Module) -> Any:
    """Return the frozen base of a wrapped model as a model of its own that shares every tensor.

    It has the model's class and no adapters, is in eval mode, and costs no memory. TRL's DPO, KTO,
    GRPO and RLOO get their reference by themselves (this view, or, where the adapter has been
    trained before, a frozen copy of the adapter on it); for a loop of one's own, this is it.

    Args:
        model: A wrapped model that is not merged.

    Returns:
        A model of the same class. Its parameters are those of ``model``; training must not touch
        them, and hf_lora does not. Only what somebody trains in the base itself is copied.

    Raises:
        StateError: The model is not wrapped, is merged, is spread over several processes, or has a
            forward that another library put on the object and that would lead back to the model
            with its adapters.
    """
    inner, registry = _viewable(model)
    return _strip(_twin(inner, shared=_frozen(inner, registry)))


def policy_view(model: nn.Module, *, share: bool = True) -> Any:
    """Return what a wrapped model computes at this moment, as a model that stays so.

    The base is shared. The active adapters are copied, or left out where they do not change
    anything yet.

    Args:
        model: A wrapped model that is not merged.
        share: Whether tensors of the base are shared; a copy is for whoever shards it.

    Returns:
        A model of the same class, in eval mode, nothing of which trains.

    Raises:
        StateError: As for :func:`base_view`.
    """
    inner, registry = _viewable(model)
    chosen = registry.routing.now().chosen
    active = [name for name, _ in chosen]
    view = _twin(inner, shared=_frozen(inner, registry, active) if share else ())
    if is_fresh(registry):
        return _strip(view)
    _, copied = wrapped(holder_of(view))
    for name in [name for name in copied.adapters if name not in active]:
        remove_adapter(copied, name)
    copied.routing.choose(chosen)
    for parameter in view.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    return view.eval()


@torch.no_grad()
def is_fresh(registry: Registry) -> bool:
    """Say whether the active adapters leave the outputs as the base's, as they do at first.

    Where they are spread, every process must ask.
    """
    for name in registry.routing.active:
        for path in registry.adapter(name).places:
            module = registry.modules[path]
            if not module.lora_is_at_start(name, gather_full(module.lora_tensors(name))):
                return False
        for _, module, role, tensor in registry.held_buffers(name):
            if not torch.equal(tensor, dict(own_tensors(module, (role,)))[role].to(tensor)):
                return False
    return True


def _viewable(model: nn.Module) -> tuple[nn.Module, Registry]:
    inner, registry = settled(model) or wrapped(model)
    registry.check_unmerged("view the base")
    if has_distributed_parameters(inner):
        raise StateError(
            "This model is spread over several processes, and what spreads it fetches the weights "
            "for this one object. Use hf_lora.no_adapter(model) instead."
        )
    return inner, registry


def _frozen(
    model: nn.Module, registry: Registry, copied: Iterable[str] = ()
) -> Iterator[torch.Tensor]:
    """Yield the tensors that two models can share: those that no training moves."""
    adapters = registry.all_parameters()
    own = {id(t) for name in copied for *_, t in registry.tensors(name)}
    own |= {id(t) for name in copied for *_, t in registry.held_buffers(name)}
    own |= {id(p) for p in model.parameters() if p.requires_grad and id(p) not in adapters}
    own |= {id(known.now()) for known in registry.buffers.known if known.whole}
    for module in model.modules():
        for tensor in _tensors(vars(module), _DEPTH):
            if id(tensor) not in own:
                yield tensor


def _twin(model: nn.Module, shared: Iterable[torch.Tensor]) -> nn.Module:
    """Return a copy of the model that shares these tensors, and whose forwards are its own."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    twin = copy.deepcopy(model, memo)
    for path, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if forward is None:
            continue
        own = _rebound(forward, memo)
        if any(id(each) in memo for each in _reached(own)):
            where = path or f"this {type(model).__name__}"
            raise StateError(
                f"The forward of {where} was replaced by {getattr(forward, '__module__', forward)},"
                " and a view would call it with the adapters; call hf_lora.base_view(model) before "
                "that is done."
            )
        memo[id(module)].__dict__["forward"] = own
    return twin


def _strip(view: nn.Module) -> nn.Module:
    """Take everything of hf_lora off a view; the tensors themselves are not touched."""
    holder = holder_of(view)
    copied = pop_registry(holder)
    for name in copied.adapters:
        copied.buffers.drop(name)
    for name, adapter in copied.adapters.items():
        for path in adapter.places:
            copied.modules[path].lora_remove(name)
    for module in (*copied.modules.values(), *copied.norms.values()):
        restore_class(module)
    copied.buffers.reclass()
    uninstall(holder)
    for parameter in view.parameters():
        if parameter.requires_grad:  # a copy of what trains in the base itself
            parameter.requires_grad_(False)
    return view.eval()


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """Return a forward, or what it closes over, with each object replaced by its copy in ``memo``.

    ``copy.deepcopy`` leaves functions as they are, and with them the model that they close over.
    """
    if isinstance(value, types.MethodType):
        return types.MethodType(_rebound(value.__func__, memo), _rebound(value.__self__, memo))
    if isinstance(value, functools.partial):
        args = [_rebound(each, memo) for each in value.args]
        made = functools.partial(_rebound(value.func, memo), *args, **value.keywords)
        vars(made).update(vars(value))
        return made
    if id(value) in memo:
        return memo[id(value)]
    if not isinstance(value, types.FunctionType):
        return _rebound_object(value, memo) if _is_callable_object(value) else value
    if not value.__closure__:
        return value
    cells = tuple(types.CellType() for _ in value.__closure__)
    made = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
    )
    made.__kwdefaults__ = value.__kwdefaults__
    memo[id(value)] = functools.update_wrapper(made, value)
    vars(made).update(vars(value))  # and the function that it wraps itself
    for cell, old in zip(cells, value.__closure__, strict=True):
        cell.cell_contents = _rebound(old.cell_contents, memo)
    return made


def _rebound_object(value: Any, memo: dict[int, Any]) -> Any:
    made = memo[id(value)] = object.__new__(type(value))  # not all let themselves be copied
    vars(made).update({name: _rebound(held, memo) for name, held in vars(value).items()})
    return made


def _is_callable_object(value: Any) -> bool:
    is_object = hasattr(value, "__dict__") and not isinstance(value, type | nn.Module)
    return callable(value) and is_object


def _reached(value: Any, depth: int = 6) -> Iterator[nn.Module]:
    """Yield the modules to which a forward leads, through closures and what they hold."""
    if isinstance(value, nn.Module):
        yield value
    elif depth:
        inside: list[Any] = []
        if isinstance(value, types.MethodType):
            inside = [value.__self__, value.__func__]
        elif isinstance(value, types.FunctionType):
            inside = [cell.cell_contents for cell in value.__closure__ or ()]
        elif isinstance(value, functools.partial):
            inside = [value.func, *value.args]
        elif isinstance(value, list | tuple):
            inside = list(value)
        elif _is_callable_object(value):
            inside = list(vars(value).values())
        for each in inside:
            yield from _reached(each, depth - 1)


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Yield the tensors in a module's fields, also those that quantizers keep beside the weight."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, nn.Module | Routing):
        inside = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if isinstance(inside, dict):
            for each in list(inside.values()):
                yield from _tensors(each, depth - 1)
