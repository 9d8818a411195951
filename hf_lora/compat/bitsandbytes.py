"""What bitsandbytes' layers keep, and do to their weights. Seen in bitsandbytes 0.50."""

import copy
import functools
from typing import Any

import torch
from torch import nn

_FLAG = "support_avx512bf16_for_cpu"
_STATE, _SCALE = "quant_state", "SCB"


def keep_gradients(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Stop bitsandbytes from repacking 4-bit weights in a way that ends all training.

    On processors with AVX512-BF16 one forward in eval mode packs the weights for inference; from
    then on the layer's output has no gradient, silently. That goes for every such layer of the
    model, adapted or not, because gradients pass through all of them.

    Returns:
        The layers that were changed and what they said, for :func:`restore_packing`.
    """
    flags = ((module, getattr(module, _FLAG, False)) for module in model.modules())
    changed = [(module, flag) for module, flag in flags if flag]
    for module, _ in changed:
        if _is_repacked(getattr(module._parameters.get("weight"), _STATE, None)):
            module.state_dict()  # its saving hook unpacks the weight in place
        setattr(module, _FLAG, False)
    return changed


def restore_packing(changed: list[tuple[nn.Module, Any]]) -> None:
    """Undo :func:`keep_gradients`."""
    for module, flag in changed:
        setattr(module, _FLAG, flag)


def own_state(view: nn.Module) -> None:
    """Give a view of a bitsandbytes layer its own copy of what the layer's forward writes to."""
    for name, parameter in view._parameters.items():
        if type(parameter).__module__.startswith("bitsandbytes"):
            assert parameter is not None
            twin = torch.Tensor._make_subclass(type(parameter), parameter.data, False)
            vars(twin).update(vars(parameter))
            view._parameters[name] = twin  # type: ignore[assignment]
    for name, value in vars(view).items():
        if type(value).__module__.startswith("bitsandbytes"):
            vars(view)[name] = copy.copy(value)


def is_four_bit(weight: torch.Tensor) -> bool:
    """Say whether a weight is packed in 4 bits; without it two numbers would be read as one."""
    return getattr(weight, _STATE, None) is not None


def is_eight_bit(weight: torch.Tensor) -> bool:
    """Say whether a weight is of bitsandbytes' 8 bits, which are scaled by the row."""
    return hasattr(weight, _SCALE) and weight.dtype == torch.int8


def shape_of(weight: torch.Tensor) -> tuple[int, ...] | None:
    """Return the shape of the numbers that a packed weight stands for, None if it is not packed."""
    shape = getattr(getattr(weight, _STATE, None), "shape", None)
    return None if shape is None else tuple(shape)


def four_bit(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the numbers of a 4-bit weight, or None while they are packed for inference."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(weight, _STATE)
    return None if _is_repacked(state) else dequantize_4bit(weight.data, state)


def packed_like(weight: Any, numbers: torch.Tensor) -> nn.Parameter:
    """Return numbers as a 4-bit weight of the same kind as another one."""
    state, device = weight.quant_state, weight.device
    made = type(weight)(
        numbers.to(state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
    )
    return made.to(device)  # which is when it is packed


def four_bit_values(weight: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
    """Return the numbers at these positions of a flattened 4-bit weight, unpacking no other."""
    state: Any = getattr(weight, _STATE)
    if _is_repacked(state):
        return None
    pairs = weight.data.reshape(-1).view(torch.uint8)[positions // 2].int()
    codes = torch.where(positions % 2 == 0, pairs >> 4, pairs & 15)
    return state.code[codes] * _largest(state, positions // state.blocksize)


def pack(matrix: torch.Tensor, kind: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in 4 bits: its numbers, two in a byte, and the scale of each block.

    By the function and not by ``Linear4bit``, which on some processors repacks what it holds in a
    forward in eval mode, after which nothing can be unpacked and no gradient passes.
    """
    from bitsandbytes.functional import quantize_4bit

    numbers, state = quantize_4bit(matrix.contiguous(), blocksize=block, quant_type=kind)
    return numbers.reshape(-1), state.absmax


def unpack(
    numbers: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    block: int,
) -> torch.Tensor:
    """Return the matrix that :func:`pack` was given, as far as 4 bits say it."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(scales, torch.Size(shape), codes(kind, numbers.device), block, kind, dtype)
    return dequantize_4bit(numbers[:, None], state)


@functools.cache
def codes(kind: str, device: torch.device) -> torch.Tensor:
    """Return the 16 numbers that 4 bits stand for, before they are scaled."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(kind, device=device)


def eight_bit(module: Any) -> torch.Tensor | None:
    """Return the numbers of a layer's 8-bit weight, or None where its scales are not there."""
    scale_O = _scales(module)
    return (
        None if scale_O is None else module.weight.data.float() * (scale_O.float()[:, None] / 127)
    )


def eight_bit_values(module: Any, positions: torch.Tensor) -> torch.Tensor | None:
    """Return the numbers at these positions of a layer's flattened 8-bit weight."""
    scale_O, weight = _scales(module), module.weight
    rows = positions // weight.shape[1]
    if scale_O is None:
        return None
    return weight.data.view(-1)[positions] * (scale_O[rows] / 127)


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _scales(module: Any) -> torch.Tensor | None:
    """Return the scales (out,), which a forward moves from the weight to the layer's state."""
    scale = getattr(module.weight, _SCALE, None)
    return getattr(module.state, _SCALE, None) if scale is None else scale


def _largest(state: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Return the largest number of each of these blocks, which may be quantized in its turn."""
    if not state.nested:
        return state.absmax[blocks]
    outer = state.state2.absmax[blocks // state.state2.blocksize]
    return state.state2.code[state.absmax[blocks].int()] * outer + state.offset
