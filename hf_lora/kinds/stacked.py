"""How a layer of stacked experts is computed as it declares itself, frozen, packed or with updates.

Legend: E experts, N tokens, K experts for each, I input features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_lora.compat.experts import Declared, activation, declared
from hf_lora.functional.experts import Stacks, Update, experts, experts_plain
from hf_lora.functional.grouped import Factors, Routed
from hf_lora.functional.packed import PackedStack, Slices, Stack
from hf_lora.layers.kind import parameter_of

_ROWS = 8
"""Of the trial of whether a class computes what it says that it does."""


def run(
    host: Any,
    said: Declared,
    inputs: tuple[Any, ...],
    updates: Mapping[str, Sequence[tuple[Factors, float]]],
    plain: bool = False,
) -> torch.Tensor:
    """Compute a layer of experts as it declares itself, with updates of its parameters."""
    up, down = (_matrices(host, name, said) for name in (said.up, said.down))
    x_NI, experts_NK, weights_NK = _each_in_turn(inputs[0], len(up)) if said.takes_every else inputs
    stacks = Stacks(
        up,
        down,
        getattr(host, f"{said.up}_bias") if said.has_bias else None,
        getattr(host, f"{said.down}_bias") if said.has_bias else None,
        activation(host, said),
        host.post_expert_norm if said.has_norm else None,
    )
    routed = Routed(experts_NK, len(up))
    parts = [updates.get(name, ()) for name in (said.up, said.down)]
    trains = any(p.requires_grad for p in stacks[:4] if p is not None)  # type: ignore[union-attr]
    if plain or trains or said.has_norm or any(dropout for part in parts for _, dropout in part):
        each = [
            Update(*map(tuple, zip(*part, strict=True))) if part else Update() for part in parts
        ]
        return experts_plain(x_NI, weights_NK, routed, stacks, *each)
    factors = [[factors for factors, _ in part] for part in parts]
    return experts(x_NI, weights_NK, routed, stacks, *factors)


def _matrices(host: Any, name: str, said: Declared) -> Stack:
    """Return one of the stacks as (E, in, out)."""
    held = getattr(host, name)
    if isinstance(held, PackedStack):
        return Slices(held, turned=not said.transposed)
    return held if said.transposed else held.transpose(1, 2)


def _each_in_turn(
    x_NI: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what others are given, for experts of which each has as many rows, in order."""
    turns = torch.arange(number, device=x_NI.device)
    chosen = turns.repeat_interleave(len(x_NI) // number)[:, None]
    return x_NI, chosen, torch.ones_like(chosen, dtype=x_NI.dtype)


def is_stack(tensor: torch.Tensor) -> bool:
    """Say whether a parameter is a plain stack of floating-point matrices, all of it here."""
    floating = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return type(tensor) is nn.Parameter and tensor.dim() == 3 and floating


def sizes(host: nn.Module, part: str) -> tuple[int, int, int]:
    """Return how many experts there are, and what one of a part reads and gives."""
    stack = parameter_of(host, part)
    assert stack is not None
    number, one, other = stack.full_shape if isinstance(stack, PackedStack) else stack.shape
    return (number, one, other) if is_turned(host) else (number, other, one)


def is_turned(host: nn.Module) -> bool:
    """Say whether the stacks are (E, in, out) where A and B are made for that."""
    said = declared(host)
    # PEFT goes by what a class says
    return said is not None and said.transposed and not said.peft_swaps


def trial_rows(host: nn.Module, stack: torch.Tensor, said: Declared) -> tuple[torch.Tensor, ...]:
    """Return a few rows, two experts for each, and what these count."""
    number, wide = len(stack), stack.shape[1 if said.transposed else 2]
    drawn = torch.Generator().manual_seed(0)
    if said.takes_every:
        rows = torch.randn(2 * number, wide, generator=drawn)
        return (rows.to(stack.device, stack.dtype),)
    rows = torch.randn(_ROWS, wide, generator=drawn).to(stack.device, stack.dtype)
    first = torch.arange(_ROWS, device=stack.device) % number
    chosen = torch.stack([first, (first + 1) % number], 1)
    counts = torch.rand(_ROWS, 2, generator=drawn).to(stack.device, stack.dtype)
    return rows, chosen, counts


def activation_fault(host: nn.Module, said: Declared, stack: torch.Tensor) -> str | None:
    """Return whether the activation changes its input, of which it is made again; or None."""
    act: Callable[[torch.Tensor], torch.Tensor] = activation(host, said)
    wide = stack.shape[2 if said.transposed else 1]
    rows = torch.linspace(-9, 9, 2 * wide).to(stack.device, stack.dtype)
    rows = rows.view(2, -1)
    before = rows.clone()
    act(rows)
    return None if torch.equal(rows, before) else "its activation writes into its input"
