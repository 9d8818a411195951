"""Dropout masks at the speed of memory: one byte an element, applied by a bitwise AND.

On a CPU the random numbers of ``nn.Dropout`` cost more than all of LoRA's arithmetic. Here one
random byte decides about an element. The bytes that lie just at the threshold, one in 256, are
decided by a second, finer draw, so that every element is dropped with probability p and not with
the nearest multiple of 1/256. The masks are those of ``nn.Dropout`` in distribution, not in bits.
"""

import numpy as np
import torch

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
    mask = torch.empty(shape, dtype=torch.int8)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    _fill(mask.view(-1).numpy(), p, np.random.SFC64(seed))
    return mask


def _fill(mask: np.ndarray, p: float, bits: np.random.SFC64) -> None:
    fine = np.random.Generator(bits)
    threshold = int(p * 256)
    rest = p * 256 - threshold
    for start in range(0, mask.size, _BLOCK):
        part = mask[start : start + _BLOCK]
        drawn = bits.random_raw(-(-part.size // 8)).view(np.uint8)[: part.size]
        np.greater_equal(drawn, threshold, out=part.view(np.bool_))
        if rest:
            edge = np.flatnonzero(drawn == threshold)
            part[edge] = fine.random(edge.size) >= rest
        np.negative(part, out=part)


def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with zeros where ``mask`` drops; what is kept is not scaled by 1/(1-p)."""
    return torch.bitwise_and(x.view(_BITS[x.itemsize]), mask).view(x.dtype)


def masked_(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put zeros into ``x`` where ``mask`` drops, and return it."""
    x.view(_BITS[x.itemsize]).bitwise_and_(mask)
    return x
