"""Numbers of quantized weights, and how many there are."""

import math

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat import bitsandbytes
from hf_lora.compat.deepspeed import numel_of
from hf_lora.compat.dtensor import is_sharded
from hf_lora.compat.quantized_layers import unpacked
from hf_lora.functional.packed import PackedStack
from hf_lora.layers.hosts import features
from hf_lora.layers.kind import parameter_of


def float_weight(module: nn.Module) -> torch.Tensor | None:
    """Return the weight as floating-point numbers, unpacked where it is quantized, or None.

    None where the host's packing is not known here; the caller then does without.
    """
    weight = parameter_of(module, "weight")
    if weight is None or _is_of_eight_bits(weight):
        return unpacked(module)
    if weight.is_meta:
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
    if weight is None and name == "weight":
        found = unpacked(module)
        return None if found is None else found.reshape(-1)[at.start : at.stop : at.step]
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


def _is_of_eight_bits(weight: torch.Tensor) -> bool:
    """Say whether a weight is a plain tensor of float8, which means nothing without its scale."""
    plain = type(weight) is nn.Parameter and not weight.is_meta
    return plain and weight.is_floating_point() and weight.dtype.itemsize == 1


def packed_elsewhere(module: nn.Module) -> int:
    """Return how many numbers a layer stands for beyond those that its parameters count.

    GPTQ's layers keep theirs in buffers, and HQQ's several in one number of a parameter.
    """
    sizes = features(module)
    packed = [t for t in _own(module) if not t.is_floating_point()]
    if sizes is None or parameter_of(module, "weight") is not None or not packed:
        return 0
    counted = sum(t.numel() for t in packed if isinstance(t, nn.Parameter))
    return sizes[0] * sizes[1] - counted


def buffer_bytes(module: nn.Module) -> int:
    """Return what the buffers of such a layer take: its weight is in them."""
    if not packed_elsewhere(module):
        return 0
    return sum(map(stored_bytes, (t for t in _own(module) if not isinstance(t, nn.Parameter))))


def _own(module: nn.Module) -> list[torch.Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in held if tensor is not None]


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
