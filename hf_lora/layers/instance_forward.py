"""Forwards that another library keeps on the instance instead of the class.

accelerate puts its own ``forward`` on every module that it places on a device, and calls from there
the one that it found. What stands on an instance wins over its class, so a class
that is swapped underneath would never be asked; here such forwards are told apart and bound anew.
transformers' tensor parallelism does the same with a function that keeps the forward in a closure.
"""

import functools
import types
from typing import Any

from torch import nn

from hf_lora.compat.accelerate import KEPT_FORWARD, is_placed
from hf_lora.compat.tensor_parallel import called_by, calling


def has_foreign_forward(module: nn.Module) -> bool:
    """Say whether the instance has a forward that hides its class's and cannot be bound anew."""
    own = vars(module)
    if "forward" not in own:
        return False
    innermost = own[KEPT_FORWARD if is_placed(module) else "forward"]
    return not _is_bound(called_by(innermost), module, type(module))


def rebind_forwards(module: nn.Module, source: nn.Module, old: type[nn.Module]) -> None:
    """Make the forwards on ``module`` that lead to ``source`` and class ``old`` lead to ``module``.

    Args:
        module: The module; its class is the one that shall be asked from now on.
        source: What they are bound to: ``module`` itself, or what it was copied from.
        old: The class whose forward they call.
    """
    own = vars(module)
    for key in (KEPT_FORWARD, "forward"):
        if _is_bound(called_by(own.get(key)), source, old):
            own[key] = calling(own[key], module, types.MethodType(type(module).forward, module))
    outer = own.get("forward")
    if isinstance(outer, functools.partial) and outer.args[:1] and outer.args[0] is source:
        again = functools.partial(outer.func, module, *outer.args[1:], **outer.keywords)
        own["forward"] = functools.update_wrapper(again, own.get(KEPT_FORWARD, outer))


def _is_bound(value: Any, source: nn.Module, cls: type[nn.Module]) -> bool:
    return (
        isinstance(value, types.MethodType)
        and value.__self__ is source
        and value.__func__ is cls.forward
    )
