"""Dropout masks at the speed of memory: one bit an element is kept.

On a CPU the random numbers of ``nn.Dropout`` cost more than all of LoRA's arithmetic. Here a word
of random bits decides about 64 elements at once. The binary digits of p say how words are
combined: if each bit of ``m`` is clear with probability q, each bit of ``m | w`` is clear with q/2
and of ``m & w`` with 1/2 + q/2. So as many words as p has digits draw it. Of a p with many digits
the first few are drawn so, and what is left is drawn for 64 words together, which lie far apart;
so each element is dropped with probability p, and two that share something hardly correlate. The
masks are those of ``nn.Dropout`` in distribution, not in bits.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

_SHARE = 64
"""Words that share what is left after the digits; no two of them are neighbours."""

_CORRELATION = 1e-3
"""What two elements that share it may have in common, at most."""

_BLOCK = 1 << 12
"""Words drawn at once: with the random words for them they stay in the processor's cache."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_mask(rows: int, features: int, p: float, device: torch.device) -> torch.Tensor:
    """Return a mask that drops with probability p; :func:`unpacked` makes it readable.

    It is drawn from PyTorch's own generator of the device, or seeded by it, so that
    ``torch.manual_seed`` and a restored random state give the same masks again.

    Returns:
        On a CPU uint8, (rows, features / 8 rounded up), a bit an element; else bool, (rows,
        features).
    """
    if device.type != "cpu":
        return torch.rand(rows, features, device=device) >= p
    width = -(-features // 8)
    words = np.empty(-(-rows * width // (8 * _SHARE)) * _SHARE, np.uint64)
    _fill(words, p, np.random.SFC64(_Seed()))  # type: ignore[arg-type]
    return torch.from_numpy(words.view(np.uint8)[: rows * width].reshape(rows, width))


class _Seed(ISeedSequence):
    """PyTorch's random numbers (63 bits a word) as NumPy's state, with nothing in between.

    Spreading one number over the state, as NumPy does, takes up to half the time of a mask.
    """

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return random words."""
        count = -(-n_words * np.dtype(dtype).itemsize // 8)
        return torch.empty(count, dtype=torch.int64).random_().numpy().view(dtype)[:n_words]


@functools.cache
def _digits(p: float) -> tuple[list[bool], float]:
    """Return the first digits of a probability, lowest first, and what is left in their place."""
    allowed = _CORRELATION * p * (1 - p)
    digits: list[bool] = []
    rest = p
    while not digits or rest * (1 - rest) > allowed * 4 ** len(digits):
        rest, digit = math.modf(2 * rest)
        digits.insert(0, bool(digit))
    return digits, rest


def _fill(words: np.ndarray, p: float, bits: np.random.SFC64) -> None:
    """Clear each bit with probability p."""
    digits, rest = _digits(p)
    for start in range(0, words.size, _BLOCK):
        part = words[start : start + _BLOCK].reshape(_SHARE, -1)
        shared = bits.random_raw(32 * part.shape[1]).view(np.uint32) >= rest * 2.0**32
        part[:] = np.packbits(shared).view(np.uint64)
        drawn = bits.random_raw(len(digits) * part.size).reshape(len(digits), *part.shape)
        for digit, word in zip(digits, drawn, strict=True):
            (np.bitwise_and if digit else np.bitwise_or)(part, word, out=part)


def unpacked(mask: torch.Tensor, features: int) -> torch.Tensor:
    """Return a mask as bool, (rows, features): True where an element is kept."""
    if mask.dtype == torch.bool:
        return mask
    keep = np.unpackbits(mask.numpy(), axis=1, count=features)
    return torch.from_numpy(keep.view(np.bool_))


def masked(x: torch.Tensor, keep: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write ``x``, or zeros where it is dropped, into ``out``; nothing is scaled by 1/(1-p).

    Args:
        x: Shape (rows, features).
        keep: bool, of the same shape.
        out: Of the same shape and type as x; may be x.

    Returns:
        ``out``.
    """
    if x.device.type != "cpu":
        return torch.where(keep, x, x.new_zeros(()), out=out)
    # Multiplied as integers, elements keep their bits.
    kind = _BITS[x.dtype.itemsize]
    bits, numbers, into = x.view(kind), keep.view(torch.uint8), out.view(kind)
    if torch.get_num_threads() > 1:
        torch.mul(bits, numbers, out=into)
    else:
        # NumPy widens the mask piece by piece in the cache, PyTorch writes it out as wide as x:
        # that is slower on one thread, but PyTorch has several.
        np.multiply(bits.numpy(), numbers.numpy(), out=into.numpy())
    return out
