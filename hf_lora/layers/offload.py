"""Adapters on modules whose weights accelerate keeps elsewhere between calls.

Its hooks fetch every parameter of a module from a store before a call and drop it afterwards. An
adapter is not in the store, and what trains must stay the same object: so while such a hook works,
the module has nothing but the base's tensors. The adapter stays on the execution device.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_lora.compat import accelerate
from hf_lora.compat.accelerate import device_hooks
from hf_lora.errors import HfLoRAWarning
from hf_lora.layers.kind import Patched
from hf_lora.layers.routing import Routing

_NOBODY = Routing()
"""No adapter is active: a trained module's tensors read as the base's own."""


def hide_from_offloading(module: nn.Module) -> None:
    """Make accelerate's offload hooks see the base's tensors only."""
    for hook in device_hooks(module):
        _hide(hook)


def show_to_offloading(module: nn.Module) -> None:
    """Undo :func:`hide_from_offloading`."""
    for hook in device_hooks(module):
        if isinstance(hook, _BaseOnly):
            hook.__class__ = type(hook).__bases__[1]


def guard_new_hooks(hooks: Any) -> None:
    """Keep the adapters out of hooks that accelerate puts on a model once it is wrapped.

    accelerate would move their tensors into a store that it never writes to again, and train others
    at each call. Instead they move to the execution device, and stay the objects that they are.

    Args:
        hooks: The module ``accelerate.hooks``. Its class for such hooks is changed once, and acts
            as before on modules that hf_lora has not patched.
    """
    try:
        accelerate.guard_new_hooks(hooks, _put_on)
    except AttributeError as error:
        warnings.warn(
            f"accelerate of this version has another way to put hooks on modules ({error}): on a "
            "model that is wrapped before it is dispatched, adapters may be moved into the store "
            "of offloaded weights. Dispatch first, then wrap.",
            HfLoRAWarning,
            stacklevel=2,
        )


def _put_on(hook: Any, module: nn.Module, original: Callable[[], nn.Module]) -> nn.Module:
    patched = [m for m in _reached(hook, module) if isinstance(m, Patched)]
    if not patched:
        return original()
    with _base_only(patched):
        result = original()
    for part in patched:
        _move_added(part, hook.execution_device)
    _hide(hook)
    return result


class _BaseOnly:
    """Mixin for a hook: while it works, the modules that it reaches have no tensors of ours."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _base_only(_reached(self, module)):
            return super().pre_forward(module, *args, **kwargs)  # type: ignore[misc]

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with _base_only(_reached(self, module)):
            return super().post_forward(module, output)  # type: ignore[misc]

    def detach_hook(self, module: nn.Module) -> Any:
        with _base_only(_reached(self, module)):
            return super().detach_hook(module)  # type: ignore[misc]


@functools.cache
def _base_only_class(hook: type) -> type:
    return type(f"LoRA{hook.__name__}", (_BaseOnly, hook), {"__doc__": _BaseOnly.__doc__})


def _hide(hook: Any) -> None:
    if getattr(hook, "offload", False) and not isinstance(hook, _BaseOnly):
        hook.__class__ = _base_only_class(type(hook))


def _reached(hook: Any, module: nn.Module) -> Iterable[nn.Module]:
    """Return the modules whose tensors a hook on ``module`` fetches."""
    return module.modules() if getattr(hook, "place_submodules", False) else (module,)


@contextlib.contextmanager
def _base_only(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave each of our modules the base's tensors alone, and have them read so, for a while."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, Patched):
                stack.enter_context(_one_base_only(module))
        yield


@contextlib.contextmanager
def _one_base_only(module: Patched) -> Iterator[None]:
    added = module.lora_added()
    stores: list[dict[str, Any]] = [module._parameters, module._buffers]
    taken = [{name: store.pop(name) for name in [*store] if name in added} for store in stores]
    routing = module.__dict__["lora_routing"]
    module.__dict__["lora_routing"] = _NOBODY
    try:
        yield
    finally:
        module.__dict__["lora_routing"] = routing
        for store, tensors in zip(stores, taken, strict=True):
            store.update(tensors)


def _move_added(module: Patched, device: Any) -> None:
    if device is None or torch.device(device).type == "meta":
        return
    for name in module.lora_added():
        tensor = module._parameters.get(name)
        tensor = module._buffers.get(name) if tensor is None else tensor
        if tensor is not None and not tensor.is_meta:
            tensor.data = tensor.data.to(device)
