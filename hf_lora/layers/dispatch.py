"""The ways in which a patched linear layer computes ``y = host(x) + Σ s · (x Aᵀ) Bᵀ``: one table.

The first whose condition holds, and that does not find out while it computes that it cannot, gives
the output. The last is the plain formula: it always can, and every other is tested against it.
"""

from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hf_lora.compat.torch_execution import in_transform
from hf_lora.functional.fused import Update
from hf_lora.functional.low_rank import low_rank
from hf_lora.layers.fusing import (
    PLAIN,
    fused_forward,
    fused_on_top,
    is_apart,
    is_frozen,
    multiplies,
    precomputed,
)
from hf_lora.layers.inference import at_inference
from hf_lora.layers.routing import scales
from hf_lora.layers.tensor_parallel import draws_apart, dropped

if TYPE_CHECKING:
    from hf_lora.kinds.lora import LoRALayer

_NOT_YET: Any = object()


class Call:
    """One call of a layer; what several ways ask about it is found out once.

    Attributes:
        layer: The layer.
        x: Its input.
        alone: Whether the input is all that the layer is called with.
        ordinary: Whether ``x`` is a plain tensor in plain execution: not traced, transformed or
            lazy.
    """

    __slots__ = ("_args", "_fuses", "_kwargs", "_updates", "_y", "alone", "layer", "ordinary", "x")

    def __init__(self, layer: "LoRALayer", args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.layer = layer
        self.x: Any = args[0] if args else kwargs.get(layer.lora_input)
        self.alone = len(args) + len(kwargs) == 1
        self.ordinary = not layer.lora_routing.plain and _is_ordinary(self.x)
        self._args, self._kwargs = args, kwargs
        self._updates: list[Update] | None = None
        self._fuses: bool | None = None
        self._y = _NOT_YET

    def updates(self) -> list[Update]:
        """Return the updates of the active adapters."""
        if self._updates is None:
            self._updates = self.layer.lora_updates()
        return self._updates

    def base(self) -> torch.Tensor:
        """Return the host's own output, computed by its own forward; once, as it may draw."""
        if self._y is _NOT_YET:
            self._y = self.layer.lora_base(*self._args, **self._kwargs)
        return self._y

    def fuses(self) -> bool:
        """Say whether base and updates may be one function, as far as the call decides it."""
        if self._fuses is None:
            dropouts = (update.dropout for update in self.updates())
            self._fuses = self.ordinary and not draws_apart(self.layer, dropouts)
        return self._fuses


class Way(NamedTuple):
    """A row of the table."""

    name: str
    words: str
    """How ``summary`` counts the layers that compute so."""

    applies: Callable[[Call], bool]
    compute: Callable[[Call], torch.Tensor | None]
    """Returns the output, or None if it finds out only now that it cannot."""


def _gated(call: Call) -> torch.Tensor:
    """Compute every adapter's update and let those of the active ones through.

    What is in use is read from a tensor, so that one graph serves every choice.
    """
    layer, x, y = call.layer, call.x, call.base()
    factors = scales(layer.lora_routing, [*layer.lora_slots], y.device)
    for (name, slot), factor in zip(layer.lora_slots.items(), factors, strict=True):
        seen = F.dropout(x, slot.dropout, layer.training)
        update = low_rank(seen, *layer.lora_local(name), slot.scaling).to(y.dtype)
        y = y + torch.where(factor != 0, update * factor, 0.0)
        if name in layer.lora_routing.biased:
            bias = layer.lora_bias_of(name, y)
            y = y if bias is None else y + torch.where(factor != 0, bias * factor, 0.0)
    return y


def _ready(call: Call) -> torch.Tensor | None:
    return precomputed(call.layer, call.x)


def _fused(call: Call) -> torch.Tensor | None:
    return fused_forward(call.layer, call.updates(), call.x)


def _on_top(call: Call) -> torch.Tensor | None:
    return fused_on_top(call.layer, call.updates(), call.x, call.base())


def _plain(call: Call) -> torch.Tensor:
    y = call.base()
    for a_RI, b_OR, s, dropout in call.updates():
        seen = dropped(call.layer, call.x, dropout) if dropout else call.x
        y = y + low_rank(seen, a_RI, b_OR, s).to(y.dtype)
    return y


def _is_compiled_inference(call: Call) -> bool:
    return (
        torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and bool(call.layer.lora_routing.number)
    )


def _is_ready(call: Call) -> bool:
    return (
        call.ordinary
        and call.alone
        and call.layer.lora_routing.sharing.has_ready(call.layer)
        and torch.is_grad_enabled()
    )


GATED = Way("gated", "in a compiled graph for all adapters", _is_compiled_inference, _gated)
TOGETHER = Way(
    "together", "layers together with others that read the same tensor", _is_ready, _ready
)
"""With other layers that read the same tensor: the first of them has computed for all."""

BASE = Way("base", "by the base alone", lambda call: not call.updates(), Call.base)
"""No adapter is active here."""

ALONE = Way("alone", "alone", lambda call: call.alone and call.fuses(), _fused)
"""In one function with its base; in training that computes for the group, if there is one."""

ON_TOP = Way("on top", "on top of the base's own forward", Call.fuses, _on_top)
"""The updates in one function, on the output of the base's own forward."""

ORACLE = Way("plain", "on the plain path", lambda call: True, _plain)

WAYS = (GATED, TOGETHER, BASE, ALONE, ON_TOP, ORACLE)


def computed(layer: "LoRALayer", args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return a layer's output by the first way that can."""
    if len(args) == 1 and not kwargs and not torch.is_grad_enabled():
        y = at_inference(layer, args[0])
        if y is not None:
            return y
    call = Call(layer, args, kwargs)
    for way in WAYS:
        if way.applies(call):
            y = way.compute(call)
            if y is not None:
                plain = way is GATED or not layer.lora_routing.biased
                return y if plain else layer.lora_with_biases(y)
    raise AssertionError("the last way always can")


def how_computed(layer: "LoRALayer", grouped: Set[nn.Module]) -> str:
    """Return the name of a layer's way in training, as far as the input does not decide it.

    Args:
        layer: The layer.
        grouped: The layers of all groups of the model: ``Sharing.grouped()``.
    """
    if layer.lora_routing.plain:
        return ORACLE.name
    own = map(layer.lora_own, ("weight", "bias"))
    if not multiplies(layer.lora_host) or not all(map(is_frozen, own)):
        return ON_TOP.name
    return TOGETHER.name if layer in grouped and not is_apart(layer) else ALONE.name


def _is_ordinary(x: Any) -> bool:
    return (
        type(x) in PLAIN
        and not torch.compiler.is_compiling()
        and not in_transform()
        and x.is_floating_point()
        and x.dim() > 0
    )
