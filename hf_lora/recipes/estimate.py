"""What a training will take, before any weight is loaded: memory by arithmetic, time by a try."""

import os
import time
import warnings
from typing import Any

import torch

from hf_lora.errors import HfLoRAWarning
from hf_lora.planning.records import Plan

_PASSES = 4
"""Times that a product with each frozen weight is computed in a step: once forward and once
backward, with two operations (times, plus) for each weight and token."""

_TRIED_SECONDS = 0.2
_SLOW = 5e9
"""Operations in a second below which a larger product would take long to try."""

_IN_LAYER = (10, 4)
"""Numbers kept for backward for each token and block, in hidden and in inner widths: the inputs
of norms, queries, keys, values, both sides of the gate. Frozen linear layers keep nothing."""

_LOGITS_BYTES = 12
"""For each token and word: logits, the same in float32, and their gradient."""


def available_bytes() -> int:
    """Return the memory of the accelerator, or of the machine if there is none."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.get_memory_info()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def step_bytes(config: Any, tokens: int, itemsize: int, *, checkpointing: bool = False) -> int:
    """Return what a step keeps beside weights, by arithmetic on the shape of a decoder.

    Args:
        config: The base's configuration.
        tokens: In a batch, padding included.
        itemsize: Bytes of a number in the base's type.
        checkpointing: Whether blocks are computed again instead of kept.
    """
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", 0) or 0
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    blocks = getattr(text, "num_hidden_layers", 1) or 1
    block = _IN_LAYER[0] * hidden + _IN_LAYER[1] * inner
    kept = block + blocks * hidden if checkpointing else blocks * block
    words = getattr(text, "vocab_size", 0) or 0
    return tokens * (kept * itemsize + words * _LOGITS_BYTES)


def base_bytes(plan: Plan, dtype: torch.dtype, *, bits: int | None = None) -> int:
    """Return what the base's weights take in a type, or quantized to ``bits`` if it is said."""
    if bits is None:
        return plan.base_parameters * dtype.itemsize
    # blocks of 64 share an absolute maximum in half a bit more
    return int(plan.base_parameters * (bits + 0.5) / 8)


def adapter_bytes(plan: Plan) -> int:
    """Return what the adapter takes in training: its weights, gradients and Adam's moments."""
    return plan.weight_bytes + plan.gradient_bytes + plan.adam_bytes


def seconds(plan: Plan, tokens: int, dtype: torch.dtype) -> float:
    """Return how long training on so many tokens will take here.

    The operations of all products over the speed of one product of a middling size, tried now.

    Args:
        plan: Of the base.
        tokens: In all, over all epochs, padding included.
        dtype: The base's type.
    """
    operations = 2 * _PASSES / 2 * plan.base_parameters * tokens
    return operations / operations_per_second(dtype)


def faster_type(dtype: torch.dtype) -> str | None:
    """Return ``"float32"`` if products of a 16-bit type are much slower here, else None.

    A CPU without instructions for them takes a hundred times as long.
    """
    if dtype.itemsize != 2:
        return None
    slow = operations_per_second(torch.float32) > 2 * operations_per_second(dtype)
    return "float32" if slow else None


def warn_if_slow(dtype: torch.dtype, instead: str) -> None:
    """Warn if products of a base's type are slow here: it may take minutes for every token.

    Args:
        dtype: The base's, as it is stored, because nobody has said another.
        instead: What to say, with the faster type's name in braces.
    """
    faster = faster_type(dtype)
    if faster is not None:
        stored = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{stored} is slow on this machine: {instead.format(faster)}",
            HfLoRAWarning,
            stacklevel=3,
        )


def operations_per_second(dtype: torch.dtype) -> float:
    """Return the speed of products of a type here, tried now."""
    small = _speed(dtype, 256, least=0.0)
    return small if small < _SLOW else _speed(dtype, 1024, least=_TRIED_SECONDS)


def _speed(dtype: torch.dtype, side: int, least: float) -> float:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    left = torch.ones(side, side, dtype=dtype, device=device)
    right = torch.ones(side, side, dtype=dtype, device=device)

    def product() -> float:
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        return time.perf_counter() - start

    product()
    taken, count = product(), 1
    while taken < least:
        taken, count = taken + product(), count + 1
    return 2 * side**3 * count / taken


def in_words(wanted: float) -> str:
    """Return seconds as people say them."""
    if wanted < 90:
        return f"{max(round(wanted), 1)} s"
    if wanted < 90 * 60:
        return f"{wanted / 60:.0f} min"
    return f"{wanted / 3600:.1f} h"
