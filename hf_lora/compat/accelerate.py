"""What accelerate does to modules and in an ``Accelerator``. Seen in accelerate 1.15.

Where a module computes, whether its tensors are there, and reading them wherever they are.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_HOOK = "_hf_hook"
_GUARD = "_hf_lora_guard"
KEPT_FORWARD = "_old_forward"
"""Where accelerate keeps, on the instance, the forward that it found and calls from its own."""


def is_placed(module: nn.Module) -> bool:
    """Say whether accelerate has put a hook, and with it a forward of its own, on a module.

    Without it layers whose weights are not there would compute together with others.
    """
    return vars(module).keys() >= {_HOOK, KEPT_FORWARD}


def device_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's device hooks on ``module``, flattened, or an empty list.

    Without them an adapter would be put where the base's weights are kept, not where they compute.
    """
    hook = vars(module).get(_HOOK)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))


def guard_new_hooks(
    hooks: Any, base_only: Callable[[Any, nn.Module, Callable[[], Any]], Any]
) -> None:
    """Have accelerate's device hooks reach modules through ``base_only``, once for the process.

    Without it accelerate would move adapters into a store that it never writes to again.

    Args:
        hooks: The module ``accelerate.hooks``.
        base_only: Called with the hook, the module that it is put on, and the original.

    Raises:
        AttributeError: This version of accelerate does it in another way.
    """
    owner = hooks.AlignDevicesHook
    original = owner.init_hook
    if hasattr(original, _GUARD):
        return

    @functools.wraps(original)
    def init_hook(self: Any, module: nn.Module) -> nn.Module:
        return base_only(self, module, lambda: original(self, module))

    setattr(init_hook, _GUARD, True)
    owner.init_hook = init_hook


def prepared_models(accelerator: Any) -> list[Any]:
    """Return the models that ``accelerator.prepare`` has returned, wrapped as they were."""
    return accelerator._models


def prepared_optimizers(accelerator: Any) -> list[Any]:
    """Return the optimizers that ``accelerator.prepare`` has returned."""
    return accelerator._optimizers


@contextlib.contextmanager
def as_without_fsdp(accelerator: Any) -> Iterator[None]:
    """Have an accelerator save and load states inside as it does where nothing is sharded.

    Without it FSDP2's own way would write the whole frozen base into every state.
    """
    state = accelerator.state
    before = state.distributed_type
    # of the types without files of their own, the one whose files are read on the CPU first
    state.distributed_type = type(before).MULTI_CPU
    try:
        yield
    finally:
        state.distributed_type = before


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which ``module`` computes.

    That is where its weights are, or, where accelerate keeps them elsewhere between calls, the
    device that accelerate brings them to. A module without data is taken to be loaded on the CPU,
    and moved from there with whatever was added to it.
    """
    for hook in device_hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    first = next(_tensors(module), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


def is_offloaded(module: nn.Module) -> bool:
    """Say whether accelerate holds the module's tensors elsewhere between its calls."""
    return bool(_offload_hooks(module))


def offloads_below(module: nn.Module) -> bool:
    """Say whether accelerate fetches the tensors of the whole tree below ``module`` at once."""
    return any(getattr(hook, "place_submodules", False) for hook in _offload_hooks(module))


def is_on_meta(module: nn.Module) -> bool:
    """Say whether a tensor of ``module`` itself has no data, and nobody will bring it."""
    return not is_offloaded(module) and any(t.is_meta for t in _tensors(module))


@contextlib.contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Make the module's own tensors readable inside the ``with`` block, offloaded or not."""
    with contextlib.ExitStack() as stack:
        for hook in _offload_hooks(module):
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def _offload_hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in device_hooks(module) if getattr(hook, "offload", False)]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
