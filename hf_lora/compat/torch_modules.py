"""What ``nn.Module`` keeps of its hooks, and how it is given new memory. Seen in PyTorch 2.13."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

Store = dict[Any, Any]

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps hooks that run in a forward or a backward. Without one of them the copy of a
model that is traced would call the user's hooks."""


def hook_count() -> int:
    """Return a number that grows with each hook that is registered anywhere in the process.

    Without it every module would have to be looked at in each forward.
    """
    return RemovableHandle.next_id


def forward_hooks(module: nn.Module) -> tuple[Store, Store]:
    """Return the live tables of a module's own forward hooks: before it, and after it."""
    return module._forward_pre_hooks, module._forward_hooks


def forward_hooks_of_all() -> tuple[Store, Store]:
    """Return the live tables of the forward hooks that stand on all modules of the process.

    Without it what such a hook writes into an activation would not be seen.
    """
    return torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks


def remove_pre_hooks(module: nn.Module, chosen: Callable[[Any], bool]) -> None:
    """Remove the forward pre-hooks for which ``chosen(hook)`` holds, without their handles.

    A handle is lost when a model is copied or pickled; the hook comes along.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if chosen(hook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def remove_state_hooks(module: nn.Module, chosen: Callable[[Any], bool]) -> None:
    """Remove the hooks around ``state_dict`` and ``load_state_dict`` that are chosen, likewise."""
    tables = (
        module._state_dict_pre_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    )
    for table in tables:
        for key, hook in list(table.items()):
            if chosen(getattr(hook, "hook", hook)):  # some stand in a wrapper
                del table[key]


def is_replica(module: nn.Module) -> bool:
    """Say whether ``nn.DataParallel`` has made a module, for one forward on one device.

    Without it what a replica has computed would be handed to the layers of another.
    """
    return "_is_replica" in vars(module)


def storage_of(tensor: torch.Tensor) -> int:
    """Return what is equal for all tensors that are views of one memory, on any device."""
    return tensor.untyped_storage()._cdata


def is_to_empty(fn: Callable[..., Any]) -> bool:
    """Say whether a function that is applied to every tensor is that of ``nn.Module.to_empty``.

    It says so only by the name of the function around it. Without that an adapter's values would
    be replaced by whatever stood in the new memory.
    """
    return getattr(fn, "__qualname__", "").startswith(f"{nn.Module.to_empty.__qualname__}.")
