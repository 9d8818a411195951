"""What layers of other libraries' quantizers stand for, asked of the layers themselves.

Seen in hqq 0.2.8 (``core/quantize.py``), gptqmodel 7.7 (``nn_modules/qlinear``: GPTQ and AWQ) and
transformers 5.24 (``integrations/finegrained_fp8.py``).
"""

from typing import Any

import torch
from torch import nn

_KNOWN = ("hqq", "gptqmodel", "transformers.integrations.finegrained_fp8")


def is_known(module: nn.Module) -> bool:
    """Say whether :func:`unpacked` knows a layer's library: beside its weight it has what packs it.

    Without it scales and zeros would count as tensors of a base, which no full base has.
    """
    return any(_is_of(module, library) for library in _KNOWN)


def unpacked(module: nn.Module) -> torch.Tensor | None:
    """Return the weight (out, in) that a layer computes with, or None if its way is not known.

    Without it a base of such layers would not be recognized again.
    """
    layer: Any = module
    hqq, gptqmodel, fp8 = _KNOWN
    made = None
    if _is_of(module, hqq):
        made = layer.dequantize()
    elif _is_of(module, gptqmodel):
        made = layer.dequantize_weight().t()  # kept as (in, out)
    elif _is_of(module, fp8) and isinstance(module, nn.Linear):
        made = _fp8(layer)
    return made if made is not None and made.dim() == 2 else None


def _is_of(module: nn.Module, library: str) -> bool:
    names = (kind.__module__ for kind in type(module).__mro__)
    return any(name == library or name.startswith(f"{library}.") for name in names)


def _fp8(layer: Any) -> torch.Tensor | None:
    """Return float8 numbers times the scale of their block."""
    weight, scale, block = layer.weight, layer.weight_scale_inv, layer.block_size
    if weight.element_size() > 1:
        return weight.detach()
    wide, scale = weight.detach().float(), scale.detach().float()
    if block is None:
        return wide * scale
    rows, columns = wide.shape
    scale = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)
    return wide * scale[:, :columns]


def is_compressed(module: nn.Module) -> bool:
    """Say whether compressed-tensors has put a forward on a layer, in place of its class's."""
    return hasattr(module, "quantization_scheme") and hasattr(module, "quantization_status")
