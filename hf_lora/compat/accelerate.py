"""Where a module computes, whether its tensors are there, and reading them wherever they are."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def device_hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's device hooks on ``module``, flattened, or an empty list."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return list(getattr(hook, "hooks", [hook]))


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
