"""Buffers of a module of which adapters have copies, whatever else the module carries.

The class that the module has, be it its own or one of ours, gets one more on top, in which the
buffer's name reads as the copy of the adapter in use: for the module's own forward, and for whoever
else asks. The base's buffer stays where it is.
"""

import functools
from typing import Any

import torch
from torch import nn

from hf_lora.compat.torch_modules import is_replica
from hf_lora.errors import TargetError
from hf_lora.layers.choice import Weights
from hf_lora.layers.instance_forward import rebind_forwards
from hf_lora.layers.kind import patched_class
from hf_lora.layers.names import HELD, copy_kind, parameter_name
from hf_lora.layers.routing import Routing
from hf_lora.layers.trained import mixture, stored

_ROUTING = "lora_buffers_routing"
_NAMES = "lora_buffers_names"
_BELOW = "lora_buffers_below"
"""In the class: what it reads, and the class on which it stands."""


def held_by(module: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """Return the adapter's copies of a module's buffers, by name."""
    names = module.__dict__.get(HELD, {}).get(adapter, {})
    return {name: module._buffers[added] for name, added in names.items()}  # type: ignore[misc]


def hold(
    module: nn.Module, routing: Routing, adapter: str, name: str, tensor: torch.Tensor
) -> None:
    """Make a tensor the adapter's copy of a buffer.

    Raises:
        TargetError: The module's class cannot be changed; nothing has changed.
    """
    held: dict[str, dict[str, str]] = module.__dict__.get(HELD, {})
    _put_on_top(module, tuple(dict.fromkeys((*_names(held), name))))
    added = parameter_name(copy_kind(name), adapter)
    module.register_buffer(added, tensor)
    module.__dict__[_ROUTING] = routing
    # a new one each time: who has noted the old one, to bring it back, has it as it was
    module.__dict__[HELD] = held | {adapter: {**held.get(adapter, {}), name: added}}


def let_go(module: nn.Module, adapter: str) -> None:
    """Take the adapter's copies away, and the class on top if there are no others."""
    held = dict(module.__dict__.get(HELD, {}))
    for added in held.pop(adapter, {}).values():
        del module._buffers[added]
    module.__dict__[HELD] = held
    if not held:
        for field in (HELD, _ROUTING):
            module.__dict__.pop(field, None)
        _take_off(module)


def hold_again(module: nn.Module) -> None:
    """Put the class on top again, after the one below was changed."""
    if HELD in module.__dict__:
        _put_on_top(module, _names(module.__dict__[HELD]))
    else:
        _take_off(module)


def shares_of(module: nn.Module, name: str, weights: Weights) -> list[tuple[torch.Tensor, float]]:
    """Return the copies of a buffer that these adapters have, each with its factor."""
    held = module.__dict__.get(HELD, {})
    added = [(held[adapter].get(name), f) for adapter, f in weights if adapter in held]
    return [(module._buffers[each], f) for each, f in added if each is not None]  # type: ignore[misc]


def held_now(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what the buffers read as of which adapters in use here have copies."""
    names = _names(module.__dict__.get(HELD, {}))
    live = module.__dict__[_ROUTING].now().live if names else ()
    return {name: getattr(module, name) for name in names if shares_of(module, name, live)}


def mixed(base: torch.Tensor, copies: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Return what a buffer is with some of each copy; where it counts, what the strongest has."""
    if len(copies) == 1 and copies[0][1] == 1.0:
        return copies[0][0]
    if not base.is_floating_point():
        return max(copies, key=lambda pair: pair[1])[0]
    return mixture(base, copies).to(base.dtype)


def _names(held: dict[str, dict[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in held.values() for name in names))


def _put_on_top(module: nn.Module, names: tuple[str, ...]) -> None:
    old = type(module)
    if vars(old).get(_NAMES) == names:
        return
    below = vars(old).get(_BELOW, old)
    try:
        module.__class__ = _class(below, names)
    except TypeError as error:  # such as a class that forbids subclasses
        raise TargetError(f"its {below.__name__} cannot be patched in place: {error}") from error
    rebind_forwards(module, module, old)


def _take_off(module: nn.Module) -> None:
    while _BELOW in vars(type(module)):
        old = type(module)
        module.__class__ = vars(old)[_BELOW]
        rebind_forwards(module, module, old)


@functools.cache
def _class(below: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        """Keep a buffer that the module's own code replaces where it is read, not in the base."""
        if name in names and isinstance(value, torch.Tensor) and not is_replica(self):
            held = self.__dict__.get(HELD)
            live = self.__dict__[_ROUTING].now().live if held else ()
            own = (held[adapter] for adapter, _ in live if held and adapter in held)
            name = next((each[name] for each in own if name in each), name)
        below.__setattr__(self, name, value)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (_steps(type(self)),), self.__getstate__()

    ours = {key: vars(below)[key] for key in ("lora_host",) if key in vars(below)}
    fields = {
        "__module__": __name__,
        "__doc__": below.__doc__,
        "__setattr__": set_attribute,
        "__reduce_ex__": reduce,
        _NAMES: names,
        _BELOW: below,
    }
    return type(below.__name__, (below,), ours | fields | {n: _reader(below, n) for n in names})


def _reader(below: type[nn.Module], name: str) -> property:
    under = getattr(below, name, None)

    def read(self: nn.Module) -> torch.Tensor:
        # of a module that another adapter trains in full it is that one's property
        base = under.fget(self) if isinstance(under, property) else stored(self, name)  # type: ignore[misc]
        if HELD not in self.__dict__:
            return base
        copies = shares_of(self, name, self.__dict__[_ROUTING].now().live)
        return mixed(base, copies) if copies else base

    def write(self: nn.Module, value: torch.Tensor) -> None:
        # only the replicas of nn.DataParallel keep tensors as plain attributes
        self.__dict__[name] = value

    return property(read, write)


def _steps(cls: type) -> tuple[Any, ...]:
    """Return how a class was made of one that can be imported."""
    own = vars(cls)
    if _BELOW in own:
        return (*_steps(own[_BELOW]), own[_NAMES])
    if "lora_mixin" in own and own["lora_mixin"] is not cls:
        return (*_steps(own["lora_host"]), (own["lora_mixin"], own["lora_names"]))
    return (cls,)


def _rebuild(steps: tuple[Any, ...]) -> nn.Module:
    cls, *above = steps
    for step in above:
        patched = step and isinstance(step[0], type)
        cls = patched_class(step[0], cls, step[1]) if patched else _class(cls, step)
    return object.__new__(cls)
