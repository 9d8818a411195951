"""Numbers of quantized weights, and how many there are."""

import math

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat import bitsandbytes
from hf_lora.compat.deepspeed import numel_of
from hf_lora.compat.dtensor import is_sharded
from hf_lora.functional.packed import PackedStack
from hf_lora.layers.kind import parameter_of


def float_weight(module: nn.Module) -> torch.Tensor | None:
    """Return the weight as floating-point numbers, unpacked where it is quantized, or None.

    None where the host's packing is not known here; the caller then does without.
    """
    weight = parameter_of(module, "weight")
    if weight is None or weight.is_meta:
        return None
    if is_sharded(weight):
        return weight if weight.is_floating_point() else None
    if bitsandbytes.is_four_bit(weight):
        return bitsandbytes.four_bit(weight)
    if bitsandbytes.is_eight_bit(weight):
        return bitsandbytes.eight_bit(module)
    if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        return weight.dequantize()
    return weight if weight.is_floating_point() else None


def float_values(module: nn.Module, at: range, name: str = "weight") -> torch.Tensor | None:
    """Return the numbers at these positions of a flattened weight, as :func:`float_weight` does.

    Of bitsandbytes' weights only those are unpacked, and of packed experts; of others the whole
    weight, for the moment.
    """
    weight = parameter_of(module, name)
    if weight is None or weight.is_meta or is_sharded(weight):
        return None
    positions = torch.arange(at.start, at.stop, at.step, device=weight.device)
    if isinstance(weight, PackedStack):
        return weight.numbers_at(positions)
    if name != "weight":
        return None
    if bitsandbytes.is_four_bit(weight):
        return bitsandbytes.four_bit_values(weight, positions)
    if bitsandbytes.is_eight_bit(weight):
        return bitsandbytes.eight_bit_values(module, positions)
    whole = float_weight(module)
    return None if whole is None or whole.dtype.itemsize < 2 else whole.reshape(-1)[positions]


def shape_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the shape of the numbers that a packed parameter stands for; None if it is not."""
    if isinstance(tensor, PackedStack):
        return tensor.full_shape
    return bitsandbytes.shape_of(tensor)


def numel(tensor: torch.Tensor) -> int:
    """Return how many numbers a parameter stands for, however they are packed."""
    if is_lazy(tensor):
        return 0
    shape = shape_of(tensor)
    return math.prod(shape) if shape is not None else numel_of(tensor)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return how many bytes a parameter takes; a quantized tensor's own type may say otherwise."""
    if is_lazy(tensor):
        return 0
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[operator]
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return numel_of(tensor) * tensor.element_size()
