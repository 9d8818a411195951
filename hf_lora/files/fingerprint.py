"""A base model's fingerprint: enough of the targeted weights to tell it from another model.

Kept in the adapter's header and compared on load. A sample, not a hash: the base may be loaded in
another type, or quantized, and still be the same base.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hf_lora.files.json_text import is_number
from hf_lora.partitions import numel_of
from hf_lora.sharding import pick

_LAYERS = 16
_VALUES = 16
_SAME = 0.01
"""Relative difference up to which weights are the same: bfloat16 rounds by up to 0.004."""

_SAME_QUANTIZED = 0.35
"""The same where either side is quantized: 4-bit NF4 differs by about 0.1, 0.2 in a bad layer."""

Reader = Callable[[str], tuple[torch.Tensor | None, bool]]
"""Path of a layer to its weight (None if it cannot be read) and whether it is quantized."""


def take(paths: Iterable[str], read: Reader) -> dict[str, Any]:
    """Return the fingerprint of the layers at ``paths``; their sizes are those of the factors."""
    samples = {}
    quantized = False
    for path in _spread(sorted(paths)):
        weight, packed = read(path)
        if weight is not None:
            quantized |= packed
            samples[path] = _sample(weight)
    return {"quantized": quantized, "samples": samples}


def differences(
    fingerprint: Mapping[str, Any], rename: Mapping[str, str], read: Reader
) -> list[str]:
    """Return a line for each sampled layer whose weight is not the one that was recorded.

    Args:
        fingerprint: As :func:`take` made it; a stranger may have changed it.
        rename: Path in the fingerprint to path in the model.
        read: The model's weights.
    """
    found = []
    samples = fingerprint.get("samples")
    for path, recorded in samples.items() if isinstance(samples, dict) else ():
        if path not in rename:
            continue
        weight, packed = read(rename[path])
        if weight is None:
            continue
        if not _is_sample(recorded):
            found.append(f"{path}: the recorded sample is damaged")
            continue
        then = torch.tensor(recorded, dtype=torch.float64)
        now = torch.tensor(_sample(weight), dtype=torch.float64)
        limit = _SAME_QUANTIZED if packed or fingerprint.get("quantized") else _SAME
        off = _distance(then, now)
        if not off <= limit:
            found.append(f"{rename[path]}: the weights differ by {off:.0%} (allowed: {limit:.0%})")
    return found


def _spread(paths: list[str]) -> list[str]:
    if len(paths) <= _LAYERS:
        return paths
    return [paths[i * (len(paths) - 1) // (_LAYERS - 1)] for i in range(_LAYERS)]


def _sample(weight: torch.Tensor) -> list[float]:
    count = numel_of(weight)
    positions = torch.arange(0, count, max(count // _VALUES, 1))[:_VALUES]
    return [float(f"{value:.6g}") for value in pick(weight, positions).tolist()]


def _is_sample(recorded: Any) -> bool:
    return isinstance(recorded, list) and len(recorded) <= _VALUES and all(map(is_number, recorded))


def _distance(then: torch.Tensor, now: torch.Tensor) -> float:
    if then.shape != now.shape:
        return float("inf")
    return float((then - now).norm() / then.norm().clamp_min(1e-12))
