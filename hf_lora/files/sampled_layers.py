"""Fingerprints as hf_lora 0.1 wrote them: up to 16 targeted weights, 16 numbers of each as JSON."""

from collections.abc import Mapping
from typing import Any

import torch

from hf_lora.files.safe_json import is_number

_VALUES = 16
_SAME = 0.01
"""Relative difference up to which weights are the same: bfloat16 rounds by up to 0.004."""

_SAME_QUANTIZED = 0.35
"""The same where either side is quantized: 4-bit NF4 differs by about 0.1, 0.2 in a bad layer."""

DAMAGED = "the recorded sample is damaged"


def sampled_layers(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the path of each layer to what was recorded of its weight; a stranger may have."""
    samples = fingerprint.get("samples")
    return samples if isinstance(samples, dict) else {}


def positions(count: int) -> range:
    """Return which of a weight's ``count`` numbers were recorded."""
    step = max(count // _VALUES, 1)
    return range(0, min(count, _VALUES * step), step)


def difference(recorded: Any, now: torch.Tensor, quantized: bool) -> str | None:
    """Return in what a weight is not the one that was recorded, or None.

    Args:
        recorded: What the file has of it.
        now: The numbers at the same positions, now.
        quantized: Whether either of the two is quantized.
    """
    if not isinstance(recorded, list) or len(recorded) > _VALUES:
        return DAMAGED
    if not all(map(is_number, recorded)):
        return DAMAGED
    then = torch.tensor(recorded, dtype=torch.float64)
    limit = _SAME_QUANTIZED if quantized else _SAME
    same = then.shape == now.shape
    off = float((then - now).norm() / then.norm().clamp_min(1e-12)) if same else float("inf")
    return None if off <= limit else f"the weights differ by {off:.0%} (allowed: {limit:.0%})"
