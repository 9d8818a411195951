"""What quantized hosts need before they can carry an adapter."""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat.deepspeed import numel_of
from hf_lora.compat.dtensor import is_sharded
from hf_lora.layers.kind import parameter_of

_FLAG = "support_avx512bf16_for_cpu"


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
        state = getattr(parameter_of(module, "weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
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


def float_weight(module: nn.Module) -> torch.Tensor | None:
    """Return the weight as floating-point numbers, unpacked where it is quantized, or None.

    None where the host's packing is not known here; the caller then does without.
    """
    weight = parameter_of(module, "weight")
    if weight is None or weight.is_meta:
        return None
    if is_sharded(weight):
        return weight if weight.is_floating_point() else None
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return (
            None
            if getattr(state, "packing_format_for_cpu", False)
            else dequantize_4bit(weight.data, state)
        )
    if hasattr(weight, "SCB") and weight.dtype == torch.int8:
        scale = getattr(weight, "SCB", None)
        scale = getattr(module.state, "SCB", None) if scale is None else scale
        return None if scale is None else weight.data.float() * (scale.float()[:, None] / 127)
    if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        return weight.dequantize()
    return weight if weight.is_floating_point() else None


def float_values(module: nn.Module, at: range) -> torch.Tensor | None:
    """Return the numbers at these positions of the flattened weight, as :func:`float_weight` does.

    Of bitsandbytes' weights only those are unpacked; of others the whole weight, for the moment.
    """
    weight = parameter_of(module, "weight")
    if weight is None or weight.is_meta or is_sharded(weight):
        return None
    positions = torch.arange(at.start, at.stop, at.step, device=weight.device)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            return None
        pairs = weight.data.reshape(-1).view(torch.uint8)[positions // 2].int()
        codes = torch.where(positions % 2 == 0, pairs >> 4, pairs & 15)
        return state.code[codes] * _largest(state, positions // state.blocksize)
    if hasattr(weight, "SCB") and weight.dtype == torch.int8:
        scale = getattr(weight, "SCB", None)
        scale = getattr(module.state, "SCB", None) if scale is None else scale
        rows = positions // weight.shape[1]
        return None if scale is None else weight.data.view(-1)[positions] * (scale[rows] / 127)
    whole = float_weight(module)
    return None if whole is None or whole.dtype.itemsize < 2 else whole.reshape(-1)[positions]


def _largest(state: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Return the largest number of each of these blocks, which may be quantized in its turn."""
    if not state.nested:
        return state.absmax[blocks]
    outer = state.state2.absmax[blocks // state.state2.blocksize]
    return state.state2.code[state.absmax[blocks].int()] * outer + state.offset


def numel(tensor: torch.Tensor) -> int:
    """Return how many numbers a parameter stands for, however they are packed."""
    if is_lazy(tensor):
        return 0
    shape = getattr(getattr(tensor, "quant_state", None), "shape", None)
    return math.prod(shape) if shape is not None else numel_of(tensor)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return how many bytes a parameter takes; a quantized tensor's own type may say otherwise."""
    if is_lazy(tensor):
        return 0
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[operator]
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return numel_of(tensor) * tensor.element_size()
