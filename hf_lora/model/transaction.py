"""Changing a model so that, whatever interrupts the change, the model is as before or as after.

What stands is noted before the first step, so that it does not matter at which line an exception
comes, and undoing twice is undoing once. What interrupts the undoing itself leaves the notes on the
model, and the next change goes on with them first.
"""

import types
from collections.abc import Iterable
from typing import Any, Self

from torch import nn

from hf_lora.compat.accelerate import device_hooks
from hf_lora.layers.choice import STACK
from hf_lora.layers.kind import OWN_FIELDS
from hf_lora.layers.names import HELD
from hf_lora.model.registry import find

JOURNAL = "_hf_lora_journal"
"""Where a model keeps the notes while it changes."""

_TIED = "tie_word_embeddings"
_HOLDERS = {*OWN_FIELDS, HELD} | {
    k for k, v in vars(nn.Module()).items() if isinstance(v, dict | set)
}


class Transaction:
    """The time of one change: when the ``with`` block is left uncommitted, all is undone.

    Noted are classes, fields, flags and what hf_lora knows, not the values of tensors.

    Args:
        model: Any model, wrapped or about to be, or a wrapper around one.
    """

    def __init__(self, model: nn.Module):
        left = vars(model).get(JOURNAL) if isinstance(model, nn.Module) else None
        if left is not None:
            left.roll_back()
        self._model = model

    def __enter__(self) -> Self:
        """Note what stands now."""
        model = self._model
        if not isinstance(model, nn.Module):  # which the change itself will say
            return self
        found = find(model)
        self._registry = None if found is None else found[1]
        self._notes = [_Note(module, _HOLDERS, device_hooks(module)) for module in model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}
        self._tied = [(c, getattr(c, _TIED)) for c in configs.values() if hasattr(c, _TIED)]
        self._stack = STACK.get(None)
        self._merged: list[Any] = []
        self._stored: list[Any] = []
        if self._registry is not None:
            registry = self._registry
            known = [registry, registry.routing, registry.buffers, *registry.adapters.values()]
            self._notes += [_Note(each, vars(each)) for each in known]
            self._merged = list(self._registry.originals)
            self._stored = [e.as_it_is() for original in self._merged for e in original.stored()]
        # in one line: what interrupted in between would leave notes of a change that never began
        return vars(model).setdefault(JOURNAL, self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Undo everything, unless it was committed."""
        if isinstance(self._model, nn.Module) and vars(self._model).get(JOURNAL) is self:
            self.roll_back()

    def commit(self) -> None:
        """Let the change stand: one operation."""
        self._model.__dict__.pop(JOURNAL)

    def roll_back(self) -> None:
        """Make everything what it was."""
        if self._registry is not None:
            before = {id(original) for original in self._merged}
            for original in reversed(self._registry.originals):
                if id(original) not in before:
                    original.put_back()
        for restore in self._stored:
            restore()
        for note in self._notes:
            note.bring_back()
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag  # the method of that name fails on lazy modules
        for config, tied in self._tied:
            if getattr(config, _TIED) != tied:
                setattr(config, _TIED, tied)
        if self._stack is not None and STACK.get(None) is not self._stack:
            STACK.set(self._stack)
        self._model.__dict__.pop(JOURNAL, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies of a part, such as trials make, are no part of the change."""
        return self


class _Note:
    """An object's class and fields as they stand, with what is in those that hold others."""

    def __init__(self, thing: Any, holders: Iterable[str], hooks: Iterable[Any] = ()) -> None:
        self._thing, self._class = thing, type(thing)
        self._hooks = [(hook, type(hook)) for hook in hooks]
        self._fields = {k: v for k, v in vars(thing).items() if k != JOURNAL}
        self._inside = [
            (held, _copy(held))
            for name in holders
            if isinstance(held := self._fields.get(name), dict | set | list)
        ]

    def bring_back(self) -> None:
        """Make the object what it was."""
        if type(self._thing) is not self._class:
            self._thing.__class__ = self._class
        own = vars(self._thing)
        for name in own.keys() - self._fields.keys() - {JOURNAL}:
            del own[name]
        own.update(self._fields)
        for held, copy in self._inside:
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(copy)
        for hook, cls in self._hooks:
            if type(hook) is not cls:
                hook.__class__ = cls


def _copy(held: dict | set | list) -> dict | set | list:
    """Return a plain copy; DeepSpeed's own dictionaries cannot copy themselves.

    Of items: by its keys, such a dictionary would fetch from the other processes what it is asked.
    """
    return dict(held.items()) if isinstance(held, dict) else held.copy()
