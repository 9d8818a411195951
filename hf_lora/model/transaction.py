"""Changing a model so that, whatever interrupts the change, the model is as before or as after.

What stands is noted before the first step, so that it does not matter at which line an exception
comes, and undoing twice is undoing once. What interrupts the undoing itself leaves the notes on the
model, and the next change goes on with them first.
"""

import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from torch import nn

from hf_lora.compat.accelerate import device_hooks
from hf_lora.layers.choice import STACK
from hf_lora.layers.kind import OWN_FIELDS
from hf_lora.layers.names import REGISTRY
from hf_lora.model.registry import Registry, inwards

JOURNAL = "_hf_lora_journal"
"""Where a model keeps the notes while it changes."""

_TIED = "tie_word_embeddings"
_CONTAINERS = (dict, set, list)
_OF_A_PART = (
    "_parameters", "_buffers", "_non_persistent_buffers_set",
    "lora_slots", "lora_copies", "lora_tied", "lora_token_rows",
)  # fmt: skip
"""What holds other things than before where a module inside of a model changes."""

_OF_THE_MODEL = (
    *OWN_FIELDS,
    *(name for name, held in vars(nn.Module()).items() if isinstance(held, dict | set)),
)
"""The same of the model itself, which gets hooks as well."""


Note = tuple[Any, type, dict[str, Any], tuple[str, ...], dict[str, Any]]
"""An object, its class and its fields as they stand, and what is in those that hold others."""


class Transaction:
    """The time of one change: when the ``with`` block is left uncommitted, all is undone.

    Noted are classes, fields, flags and what hf_lora knows. Of values, those that
    :meth:`keep_values` is told of.

    Args:
        model: Any model, wrapped or about to be, or a wrapper around one.
        scope: What can change, since noting takes time: the whole model; modules that carry
            adapters, without the flags of others (who gives those back notes them, in the
            registry's ``given_back``); or nothing but the values and flags that are told of.
    """

    def __init__(self, model: nn.Module, scope: Literal["model", "adapted", "values"] = "model"):
        self._model, self._scope = model, scope
        self._rest: Callable[[], None] | None = None
        inside = list(inwards(model))
        for each in inside:
            if (left := vars(each).get(JOURNAL)) is not None:
                left.roll_back()
        self._model = next((each for each in inside if REGISTRY in vars(each)), model)

    def __enter__(self) -> Self:
        """Note what stands now."""
        model = self._model
        if not isinstance(model, nn.Module):  # which the change itself will say
            return self
        registry: Registry | None = vars(model).get(REGISTRY)
        self._let_go()
        self._registry = registry
        parts: list[nn.Module] = []
        if self._scope == "model":
            parts = _modules(model)
        elif self._scope == "adapted" and registry is not None:
            parts = _adapted(registry)
        self._notes = [_note(part, _OF_A_PART) for part in parts if part is not model]
        self._notes.append(_note(model, _OF_THE_MODEL))
        hooks = [hook for part in parts for hook in device_hooks(part)]
        self._classes = [(hook, type(hook)) for hook in hooks]
        self._flags = [
            (parameter, parameter.requires_grad)
            for part in (parts if self._scope == "model" else ())
            # by items: a dictionary of DeepSpeed's fetches what it is asked for by name
            for _, parameter in part._parameters.items()
            if parameter is not None
        ]
        configs = _configs(parts)
        if registry is not None:
            known = [registry, registry.modules, registry.routing, registry.buffers]
            known += registry.adapters.values()
            self._notes += [_note(each, tuple(vars(each))) for each in known]
            adopted = [each.parameter for each in registry.adopted]
            self._flags += [(parameter, parameter.requires_grad) for parameter in adopted]
            self._data = [(parameter, parameter.data) for parameter in adopted]
            self._originals, self._merged = registry.originals, list(registry.originals)
            self._stored = [e.as_it_is() for original in self._merged for e in original.stored()]
            configs += registry.untied
        self._tied = [(config, getattr(config, _TIED)) for config in configs]
        self._stack = STACK.get(None)
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

    def finish(self, rest: Callable[[], None]) -> None:
        """Let the change stand and do the rest of it, from which there is no way back.

        Whatever interrupts the rest, it is done all the same, from its start, before the exception
        goes on. What was noted is let go of first: the rest may free what it replaces.

        Args:
            rest: What does no harm to be done again, also after a part of it.
        """
        self._rest = rest
        self._let_go()
        rest()
        self.commit()

    def keep_flags(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note whether these require gradients, before that changes."""
        self._flags += [(parameter, parameter.requires_grad) for parameter in parameters]

    def keep_modules(self, modules: Iterable[nn.Module]) -> None:
        """Note modules that carry nothing yet, before they are given something."""
        self._notes += [_note(module, _OF_A_PART) for module in modules]

    def keep_values(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note the values of these tensors, before others are written into them."""
        self._values += [(tensor, tensor.detach().clone()) for tensor in tensors]

    def _let_go(self) -> None:
        self._registry: Registry | None = None
        self._notes: list[Note] = []
        self._classes: list[tuple[Any, type]] = []
        self._flags: list[tuple[torch.Tensor, bool]] = []
        self._values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._data: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._originals: list[Any] = []
        self._merged: list[Any] = []
        self._stored: list[Any] = []
        self._tied: list[tuple[Any, bool]] = []
        self._stack: Any = None

    def roll_back(self) -> None:
        """Make everything what it was, or what it was about to be where that is the only way."""
        if self._rest is not None:
            self._rest()
            self._model.__dict__.pop(JOURNAL, None)
            return
        before = {id(original) for original in self._merged}
        for original in reversed(self._originals):
            if id(original) not in before:
                original.put_back()
        for restore in self._stored:
            restore()
        if self._registry is not None:
            for parameter, flag in self._registry.given_back:
                parameter.requires_grad = flag
        for hook, cls in self._classes:
            if type(hook) is not cls:
                hook.__class__ = cls
        for note in self._notes:
            _bring_back(*note)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag  # the method of that name fails on lazy modules
        for tensor, data in self._data:
            tensor.data = data
        with torch.no_grad():
            for tensor, values in self._values:
                tensor.copy_(values)
        for config, tied in self._tied:
            if getattr(config, _TIED) != tied:
                setattr(config, _TIED, tied)
        if self._stack is not None and STACK.get(None) is not self._stack:
            STACK.set(self._stack)
        self._model.__dict__.pop(JOURNAL, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies of a part, such as trials make, are no part of the change."""
        return self


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, in some order; nn.Module's own way takes as long as a note."""
    found, left = {model: None}, [model]
    while left:
        for _, child in left.pop()._modules.items():
            if child is not None and child not in found:
                found[child] = None
                left.append(child)
    return list(found)


def _adapted(registry: Registry) -> list[nn.Module]:
    """Return the modules that taking adapters off, or out of the weights, changes."""
    repacked = [module for module, _ in registry.repacked]
    holding = [module for _, module in registry.buffers.modules()]
    known = (*registry.modules.values(), *registry.norms.values(), *holding, *repacked)
    return list(dict.fromkeys(known))


def _configs(parts: Iterable[nn.Module]) -> list[Any]:
    """Return the configurations that say whether embeddings are tied."""
    # nn.Module's own search for what is not there takes longer than all else together
    have = [part for part in parts if "config" in vars(part) or hasattr(type(part), "config")]
    configs = {id(config): config for part in have if (config := getattr(part, "config", None))}
    return [config for config in configs.values() if hasattr(config, _TIED)]


def _note(thing: Any, holders: tuple[str, ...]) -> Note:
    fields = vars(thing).copy()
    inside = {
        name: _copy(held)
        for name in holders
        # most are empty
        if isinstance(held := fields.get(name), _CONTAINERS) and held
    }
    return thing, type(thing), fields, holders, inside


def _bring_back(
    thing: Any,
    cls: type,
    fields: dict[str, Any],
    holders: tuple[str, ...],
    inside: dict[str, Any],
) -> None:
    """Make the object what it was."""
    if type(thing) is not cls:
        thing.__class__ = cls
    own = vars(thing)
    for name in own.keys() - fields.keys() - {JOURNAL}:
        del own[name]
    own.update(fields)
    for name in holders:
        held, copy = fields.get(name), inside.get(name, ())
        if isinstance(held, _CONTAINERS) and (held or copy):
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(copy)


def _copy(held: dict | set | list) -> dict | set | list:
    """Return a plain copy; DeepSpeed's own dictionaries cannot copy themselves.

    Of items: by its keys, such a dictionary would fetch from the other processes what it is asked.
    """
    if type(held) is dict:
        return held.copy()
    return dict(held.items()) if isinstance(held, dict) else held.copy()
