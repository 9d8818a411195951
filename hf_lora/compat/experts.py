"""How transformers' layers of experts say what they are like: ``integrations/moe.py`` of 5.24.

Its decorator ``use_experts_implementation`` gives such a class a forward that leads to one of
several ways to compute, which go by attributes that it puts on each instance. Without them nobody
could tell which of a parameter's axes is the input, or where gates are.
"""

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


def declared(module: nn.Module) -> Declared | None:
    """Return what a layer of experts says of itself; None if a module is none, or says nothing."""
    said = [vars(module).get(name) for name in _SAID]
    if not all(isinstance(each, bool) for each in said) or not hasattr(module, "_apply_gate"):
        return None
    gate, bias, norm, transposed, _ = said
    up = "gate_up_proj" if gate else "up_proj"
    return Declared(up, "down_proj", bool(transposed), bool(bias), bool(gate), bool(norm))


def is_expert_parallel(module: nn.Module) -> bool:
    """Say whether a process has some of the experts only, and their indices mean those."""
    return bool(vars(module).get("_is_expert_parallel", False))


def activation(module: Any, has_gate: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what is done between the two products."""
    return module._apply_gate if has_gate else module.act_fn


def forward_below(host: type[nn.Module]) -> Callable[..., Any] | None:
    """Return the forward that a class itself has, under the one that the decorator gave it.

    None if its arguments are others than those of all ways to compute.
    """
    own = getattr(host.forward, "__wrapped__", None)
    if own is None or len(inspect.signature(own).parameters) != _ARGUMENTS + 1:
        return None
    return own
