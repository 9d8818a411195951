"""Forwards and device hooks that another library keeps on the instance instead of the class.

accelerate puts its own ``forward`` on every module that it places on a device, and calls from there
the one that it found (``_old_forward``). What stands on an instance wins over its class, so a class
that is swapped underneath would never be asked; here such forwards are told apart and bound anew.
transformers' tensor parallelism does the same with a function that keeps the forward in a closure.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_lora.devices import device_hooks
from hf_lora.layers.parallel import called_by, calling


def has_foreign_forward(module: nn.Module) -> bool:
    """Say whether the instance has a forward that hides its class's and cannot be bound anew."""
    own = vars(module)
    if "forward" not in own:
        return False
    innermost = (
        own["_old_forward"] if {"_hf_hook", "_old_forward"} <= own.keys() else own["forward"]
    )
    return not _is_bound(called_by(innermost), module, type(module))


def rebind_forwards(module: nn.Module, source: nn.Module, old: type[nn.Module]) -> None:
    """Make the forwards on ``module`` that lead to ``source`` and class ``old`` lead to ``module``.

    Args:
        module: The module; its class is the one that shall be asked from now on.
        source: What they are bound to: ``module`` itself, or what it was copied from.
        old: The class whose forward they call.
    """
    own = vars(module)
    for key in ("_old_forward", "forward"):
        if _is_bound(called_by(own.get(key)), source, old):
            own[key] = calling(own[key], module, types.MethodType(type(module).forward, module))
    outer = own.get("forward")
    if isinstance(outer, functools.partial) and outer.args[:1] and outer.args[0] is source:
        again = functools.partial(outer.func, module, *outer.args[1:], **outer.keywords)
        own["forward"] = functools.update_wrapper(again, own.get("_old_forward", outer))


def hide_from_offloading(module: nn.Module) -> None:
    """Make accelerate's offload hooks see the base's tensors only.

    They fetch every direct parameter of the module from their store before a call and drop it
    afterwards; an adapter's are not in the store, and what is trained must stay the same object.
    """
    for hook in device_hooks(module):
        if getattr(hook, "offload", False) and not isinstance(hook, _BaseOnly):
            hook.__class__ = _base_only(type(hook))


def show_to_offloading(module: nn.Module) -> None:
    """Undo :func:`hide_from_offloading`."""
    for hook in device_hooks(module):
        if isinstance(hook, _BaseOnly):
            hook.__class__ = type(hook).__bases__[1]


class _BaseOnly:
    """Mixin for a hook: while it works, the module has no parameters of ours."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _without_added(module):
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with _without_added(module):
            return super().post_forward(module, output)  # type: ignore[misc]


@functools.cache
def _base_only(hook: type) -> type:
    return type(f"LoRA{hook.__name__}", (_BaseOnly, hook), {"__doc__": _BaseOnly.__doc__})


@contextlib.contextmanager
def _without_added(module: nn.Module) -> Iterator[None]:
    added = module.lora_added() if hasattr(module, "lora_added") else set()  # type: ignore[operator]
    taken = {name: module._parameters.pop(name) for name in [*module._parameters] if name in added}
    try:
        yield
    finally:
        module._parameters.update(taken)


def _is_bound(value: Any, source: nn.Module, cls: type[nn.Module]) -> bool:
    return (
        isinstance(value, types.MethodType)
        and value.__self__ is source
        and value.__func__ is cls.forward
    )
