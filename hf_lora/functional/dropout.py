"""Dropout masks at the speed of memory: one byte an element, applied by a bitwise AND.

On a CPU the random numbers of ``nn.Dropout`` cost more than all of LoRA's arithmetic. Here one
random byte decides about an element: it is dropped if the byte is below a threshold. As p is hardly
ever a multiple of 1/256, the threshold itself is drawn, one of two neighbours, for every 64
elements that lie far apart; so each element is dropped with probability p exactly. The masks are
those of ``nn.Dropout`` in distribution, not in bits.
"""

import numpy as np
import torch

_SHARE = 64
"""Elements that share a threshold; no two of them are neighbours."""

_BLOCK = 1 << 18
"""Bytes drawn at once: what stays in the processor's cache."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_mask(shape: torch.Size, p: float, device: torch.device) -> torch.Tensor:
    """Return an int8 mask: all bits set (-1) to keep an element, 0 to drop it with probability p.

    It is drawn from PyTorch's own generator of the device, or seeded by it, so that
    ``torch.manual_seed`` and a restored random state give the same masks again.
    """
    if device.type != "cpu":
        return (torch.rand(shape, device=device) >= p).to(torch.int8).neg_()
    count = shape.numel()
    mask = torch.empty(-(-count // _SHARE) * _SHARE, dtype=torch.int8)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    _fill(mask.numpy(), p, np.random.SFC64(seed))
    return mask[:count].view(shape)


def _fill(mask: np.ndarray, p: float, bits: np.random.SFC64) -> None:
    fine = np.random.Generator(bits)
    rarer = min(p, 1 - p)  # of the two, so that a threshold always fits into a byte
    keep = np.greater_equal if rarer == p else np.less
    low = int(rarer * 256)
    rest = rarer * 256 - low
    for start in range(0, mask.size, _BLOCK):
        part = mask[start : start + _BLOCK].reshape(_SHARE, -1)
        drawn = bits.random_raw(part.size // 8).view(np.uint8).reshape(part.shape)
        thresholds = np.add(low, fine.random(part.shape[1]) < rest, dtype=np.uint8)
        keep(drawn, thresholds, out=part.view(np.bool_))
        np.negative(part, out=part)


def widened(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask as wide as the elements of ``dtype`` are, for :func:`masked`."""
    return mask.to(_BITS[dtype.itemsize])


def masked(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with zeros where a mask drops; what is kept is not scaled by 1/(1-p)."""
    return torch.bitwise_and(x.view(wide.dtype), wide).view(x.dtype)


def masked_(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """Put zeros into ``x`` where a mask drops, and return it."""
    x.view(wide.dtype).bitwise_and_(wide)
    return x
