"""Whether a hook stands on a model's modules that may write what layers read.

A write through ``.data`` leaves no trace in a tensor: what a layer reads is then no longer what it
can be computed from. The hook that may have written can be seen.
"""

import functools
from typing import Any

from torch import nn

from hf_lora.compat.torch_modules import forward_hooks, forward_hooks_of_all, hook_count

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
        if self._found or self._at != hook_count():
            self._stores = tuple(
                store
                for module in model.modules()
                if module is not model
                for store in forward_hooks(module)
            )
            self._at = -1

    def any(self) -> bool:
        """Say whether a hook stands there, or may, as no model was looked at yet."""
        if self._at != hook_count():  # counts every registration
            self._at = hook_count()
            self._found = self._stores is None or any(map(_has_strange, self._stores))
            self._found |= any(map(_has_strange, forward_hooks_of_all()))
        return self._found


def _has_strange(store: dict[Any, Any]) -> bool:
    return bool(store) and any(_package(hook) not in _KNOWN for hook in store.values())


def _package(hook: Any) -> str:
    """Return the package that a hook's code is from."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    name = getattr(hook, "__module__", None) or type(hook).__module__
    return str(name).partition(".")[0]
