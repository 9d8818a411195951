"""Whether a hook stands on a model's modules that may write what layers read.

A write through ``.data`` leaves no trace in a tensor: what a layer reads is then no longer what it
can be computed from. The hook that may have written can be seen.
"""

import functools
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

_KNOWN = ("torch", "transformers", "deepspeed", "hf_lora")
"""Packages whose own hooks write no activations."""


class Hooks:
    """The forward hooks on one model, looked at anew when any hook was registered anywhere."""

    def __init__(self) -> None:
        self._stores: tuple[dict[Any, Any], ...] | None = None
        self._at = -1
        self._found = True

    def look_at(self, model: nn.Module) -> None:
        """Look at the modules below ``model``, if any hook was registered, or stood there.

        Hooks on the model itself run before or after all of its layers.
        """
        if self._found or self._at != RemovableHandle.next_id:
            self._stores = tuple(
                store
                for module in model.modules()
                if module is not model
                for store in (module._forward_pre_hooks, module._forward_hooks)
            )
            self._at = -1

    def any(self) -> bool:
        """Say whether a hook stands there, or may, as no model was looked at yet."""
        if self._at != RemovableHandle.next_id:  # counts every registration
            self._at = RemovableHandle.next_id
            self._found = self._stores is None or any(map(_has_strange, self._stores))
            self._found |= any(map(_has_strange, _of_all_modules()))
        return self._found


def _of_all_modules() -> tuple[dict[Any, Any], ...]:
    return torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks


def _has_strange(store: dict[Any, Any]) -> bool:
    return bool(store) and any(_package(hook) not in _KNOWN for hook in store.values())


def _package(hook: Any) -> str:
    """Return the package that a hook's code is from."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    name = getattr(hook, "__module__", None) or type(hook).__module__
    return str(name).partition(".")[0]
