"""Whether what we compute is rounded no worse than what the plain way computes.

Other processors sum in another order, so no fixed number says what rounding may do. Both ways are
measured against float64, and ours may be 1.5 times as far away as the plain one. How far a single
result is away is partly chance; so several trials are compared in their geometric mean, and where
there is one, the mean is that over its numbers.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

SLACK = 1.5
FAR = 30.0
"""What a single one of several trials may be, which chance does not reach and a fault exceeds."""

Tensors = torch.Tensor | Sequence[Any] | Mapping[str, Any]
Trial = tuple[Tensors, Tensors, Tensors]
"""What is judged, what the plain way gave, and what is right (or closer to it than both)."""


def tensors_of(found: Tensors) -> list[torch.Tensor]:
    """Return the tensors of a nested result, in order."""
    if isinstance(found, torch.Tensor):
        return [found.detach()]
    inner: Iterable[Any] = found.values() if isinstance(found, Mapping) else found
    return [tensor for each in inner for tensor in tensors_of(each)]


def error(found: Tensors, exact: Tensors) -> float:
    """Return how far tensors are away, relative to their norms: the mean square's root over all."""
    if isinstance(found, Mapping):
        assert isinstance(exact, Mapping)
        assert found.keys() == exact.keys()
        exact = [exact[key] for key in found]
    pairs = list(zip(tensors_of(found), tensors_of(exact), strict=True))
    assert pairs
    assert all(one.shape == other.shape for one, other in pairs)
    squares = [_relative(one.double(), other.double()) ** 2 for one, other in pairs]
    return math.sqrt(statistics.fmean(squares))


def assert_rounded_alike(*trials: Trial) -> None:
    """Check that ours are no further away than ``SLACK`` times what the plain way's are."""
    ratios = [_ratio(*trial) for trial in trials]
    assert all(map(math.isfinite, ratios)), ratios
    mean = statistics.geometric_mean(max(ratio, 1e-3) for ratio in ratios)
    limit = SLACK * _chance(ratios, sum(each.numel() for each in tensors_of(trials[0][0])))
    assert mean <= limit, f"{mean:.2f} times as far away as the plain way, of {limit:.2f}: {ratios}"
    assert len(ratios) == 1 or max(ratios) < FAR, ratios


def _ratio(found: Tensors, plain: Tensors, exact: Tensors) -> float:
    # nothing can be asked to be closer than one rounding of the result is in the mean
    unit = max(torch.finfo(each.dtype).eps for each in tensors_of(found)) / 4
    return error(found, exact) / max(error(plain, exact), unit)


def _chance(ratios: list[float], numbers: int) -> float:
    """Return what chance adds: two standard errors of several trials, four of one's numbers."""
    if len(ratios) == 1:
        return 1 + 4 / math.sqrt(2 * max(numbers, 1))
    spread = statistics.stdev(math.log(max(ratio, 1e-3)) for ratio in ratios)
    return min(math.exp(2 * spread / math.sqrt(len(ratios))), 2.0)


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    scale = exact.norm().item()
    off = (found - exact).norm().item()
    return off / scale if scale else off
