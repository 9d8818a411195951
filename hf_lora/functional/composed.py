"""The same layers in PyTorch's own operations, for few rows.

Where a step has few rows, calls cost more than arithmetic: a backward pass that autograd runs by
itself is faster than one written in Python, and a processor's skinny products are faster in float32
than in 16 bits. What is kept is little then.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hf_lora.functional.fused import Layer

FEW_ROWS = 192
"""Rows up to which this is the faster way; measured on a processor in bfloat16, h576."""


def is_small(x: torch.Tensor, layers: Sequence[Layer]) -> bool:
    """Say whether this is the faster way: few rows, and no dropout."""
    few = x.numel() <= FEW_ROWS * x.shape[-1]
    return few and not any(update.dropout for layer in layers for update in layer.updates)


def composed(x: torch.Tensor, layers: Sequence[Layer]) -> list[torch.Tensor]:
    """Return each layer's output, shape (..., O), as :func:`hf_lora.functional.fused.fused` does.

    Args:
        x: Shape (..., I); all layers read it.
        layers: The layers, without dropout.
    """
    wide = x if x.device.type != "cpu" or x.dtype == torch.float64 else x.float()
    a = [update.a_RI for layer in layers for update in layer.updates]
    a_QI = a[0] if len(a) == 1 else torch.cat(a)
    h = iter(F.linear(wide, a_QI.to(wide.dtype)).split([a_RI.shape[0] for a_RI in a], dim=-1))
    outputs = []
    for layer in layers:
        y = layer.y
        if y is None:
            assert layer.weight_OI is not None
            y = F.linear(x, layer.weight_OI, layer.bias_O)
        dtype = y.dtype
        for update in layer.updates:
            y = y + F.linear(next(h) * update.s, update.b_OR.to(wide.dtype))
        outputs.append(y.to(dtype))  # rounded once
    return outputs
