"""How transformers' layers of experts say what they are like: ``integrations/moe.py`` of 5.24.

Llama 4's are a class that says nothing (``models/llama4``); what it would say stands here.

Its decorator ``use_experts_implementation`` gives such a class a forward that leads to one of
several ways to compute, which go by attributes that it puts on each instance. Without them nobody
could tell which of a parameter's axes is the input, or where gates are.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

_SAID = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
_ARGUMENTS = 3
"""Hidden states, the experts of each token, and what each of these counts."""


class Declared(NamedTuple):
    """What a layer of experts says of itself."""

    up: str
    """The name of the parameter that is first multiplied with: ``gate_up_proj`` or ``up_proj``."""

    down: str
    """The name of the other one."""

    transposed: bool
    """Whether they are (E, in, out), and not (E, out, in)."""

    has_bias: bool
    has_gate: bool
    has_norm: bool

    takes_every: bool = False
    """Whether it is given the same number of rows for each expert, in order, and nothing else."""

    peft_swaps: bool = False
    """Whether PEFT takes (E, in, out) for (E, out, in), since the class says nothing, so that its
    A is as wide as the output, and its B as the input."""


_LLAMA4 = "transformers.models.llama4.modeling_llama4", "Llama4TextExperts"
_OF_LLAMA4 = Declared(
    "gate_up_proj",
    "down_proj",
    transposed=True,
    has_bias=False,
    has_gate=True,
    has_norm=False,
    takes_every=True,
    peft_swaps=True,
)


def declared(module: nn.Module) -> Declared | None:
    """Return what a layer of experts says of itself; None if a module is none, or says nothing."""
    if any((kind.__module__, kind.__name__) == _LLAMA4 for kind in type(module).__mro__):
        return _OF_LLAMA4
    said = [vars(module).get(name) for name in _SAID]
    if not all(isinstance(each, bool) for each in said) or not hasattr(module, "_apply_gate"):
        return None
    gate, bias, norm, transposed, _ = said
    up = "gate_up_proj" if gate else "up_proj"
    return Declared(up, "down_proj", bool(transposed), bool(bias), bool(gate), bool(norm))


def is_expert_parallel(module: nn.Module) -> bool:
    """Say whether a process has some of the experts only, and their indices mean those."""
    return bool(vars(module).get("_is_expert_parallel", False))


def activation(module: Any, said: Declared) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what is done between the two products."""
    if said.takes_every:
        return functools.partial(_gate_first, module.act_fn)
    return module._apply_gate if said.has_gate else module.act_fn


def _gate_first(act: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return up * act(gate)


def forward_below(host: type[nn.Module], said: Declared) -> Callable[..., Any] | None:
    """Return the forward that a class itself has, under the one that the decorator gave it.

    None if its arguments are others than those of all ways to compute.
    """
    own = host.forward if said.takes_every else getattr(host.forward, "__wrapped__", None)
    wanted = 1 if said.takes_every else _ARGUMENTS
    if own is None or len(inspect.signature(own).parameters) != wanted + 1:
        return None
    return own
