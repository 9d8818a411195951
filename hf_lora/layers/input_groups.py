"""Layers that read the same tensor, computed together by the first of them.

The first layer of a group computes for all, and the others, when they are called, take what is
ready. Nothing is taken on trust: a layer takes a ready output only if it is called with that very
tensor, unchanged, under the same conditions; else it computes for itself. One that does not come
for its output, again and again, leaves the group.
"""

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_lora.compat.torch_modules import is_replica, remove_pre_hooks
from hf_lora.layers.arguments import check_arguments
from hf_lora.layers.hooks import Hooks
from hf_lora.layers.tracing import may_share, same_input_groups

_PATIENCE = 3
"""How often a layer may fail to come before it is left out; an exception in between counts."""


@dataclasses.dataclass(slots=True)
class _Ready:
    """Outputs that the first layer of a group has computed for the others."""

    x: weakref.ref[torch.Tensor]
    version: int
    conditions: Any
    outputs: dict[nn.Module, torch.Tensor]


class Sharing:
    """What is known about the inputs of one model's layers. A copy of the model learns its own."""

    def __init__(self) -> None:
        self.traced = False
        self._needed = True
        self.hooks = Hooks()
        """The hooks on the model's modules."""

        self._followers: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]]
        self._followers = weakref.WeakKeyDictionary()
        self._missed: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._proven: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]]
        self._proven = weakref.WeakKeyDictionary()
        self._local = threading.local()

    def __reduce__(self) -> tuple[type["Sharing"], tuple[()]]:
        """Copy and pickle as new: what was learnt is about these very layers."""
        return Sharing, ()

    def learn(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Trace the model at its first forward with gradients; a forward pre-hook."""
        if kwargs:
            check_arguments(model, kwargs)
        self.hooks.look_at(model)
        if (
            self.traced
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or is_replica(model)
        ):
            return
        self.traced = True
        self._needed = may_share(model)
        if not self._needed:
            return
        for leader, *followers in same_input_groups(model, args, kwargs):
            self._followers[leader] = [weakref.ref(layer) for layer in followers]

    def reconsider(self) -> None:
        """Ask again whether a trace is needed, as there is another layer."""
        self.traced &= self._needed

    def watch(self, model: nn.Module) -> None:
        """Have the model traced when it is first trained."""
        self.hooks.look_at(model)
        model.register_forward_pre_hook(self.learn, with_kwargs=True)

    def followers(self, leader: nn.Module) -> list[nn.Module]:
        """Return the layers that are called with the same tensor after ``leader``."""
        known = (reference() for reference in self._followers.get(leader, ()))
        return [
            layer for layer in known if layer is not None and self._missed.get(layer, 0) < _PATIENCE
        ]

    def grouped(self) -> set[nn.Module]:
        """Return the layers of all groups; none before the trace."""
        found = [[leader, *self.followers(leader)] for leader in list(self._followers)]
        return {layer for group in found if len(group) > 1 for layer in group}

    def has_ready(self, layer: nn.Module) -> bool:
        """Say whether an output waits for ``layer`` in this thread."""
        ready: _Ready | None = getattr(self._local, "ready", None)
        return ready is not None and layer in ready.outputs

    def take(self, layer: nn.Module, x: torch.Tensor, conditions: Any) -> torch.Tensor | None:
        """Return the output that another layer has computed for ``layer``, or None."""
        ready: _Ready | None = getattr(self._local, "ready", None)
        if (
            ready is None
            or ready.x() is not x
            or ready.version != x._version
            or ready.conditions != conditions
        ):
            return None
        output = ready.outputs.pop(layer, None)
        if not ready.outputs:
            self._local.ready = None
        return output

    def put(
        self,
        group: Sequence[nn.Module],
        x: torch.Tensor,
        conditions: Any,
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Keep what the first of ``group`` has computed for the others until they ask."""
        left: _Ready | None = getattr(self._local, "ready", None)
        for layer in left.outputs if left else ():
            self._missed[layer] = self._missed.get(layer, 0) + 1
        ready = dict(zip(group[1:], outputs[1:], strict=True))
        self._local.ready = _Ready(weakref.ref(x), x._version, conditions, ready)

    def is_proven(self, layer: nn.Module, expression: Any) -> bool | None:
        """Say whether this way to rebuild the layer's input was tried, and with what result."""
        return self._proven.get(layer, {}).get(expression)

    def prove(self, layer: nn.Module, expression: Any, result: bool) -> None:
        """Note the result of a trial."""
        self._proven.setdefault(layer, {})[expression] = result


def unwatch(model: nn.Module) -> None:
    """Take every :meth:`Sharing.watch` off the model."""
    remove_pre_hooks(model, lambda hook: isinstance(getattr(hook, "__self__", None), Sharing))
