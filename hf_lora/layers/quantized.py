"""What quantized hosts need before they can carry an adapter."""

import torch
from torch import nn

_FLAG = "support_avx512bf16_for_cpu"


def keep_gradients(model: nn.Module) -> list[nn.Module]:
    """Stop bitsandbytes from repacking 4-bit weights in a way that ends all training.

    On processors with AVX512-BF16 one forward in eval mode packs the weights for inference; from
    then on the layer's output has no gradient, silently. That goes for every such layer of the
    model, adapted or not, because gradients pass through all of them.

    Returns:
        The layers that were changed, for :func:`restore_packing`.
    """
    changed = [module for module in model.modules() if getattr(module, _FLAG, False)]
    for module in changed:
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # its saving hook unpacks the weight in place
        setattr(module, _FLAG, False)
    return changed


def restore_packing(modules: list[nn.Module]) -> None:
    """Undo :func:`keep_gradients`."""
    for module in modules:
        setattr(module, _FLAG, True)


def float_weight(module: nn.Module) -> torch.Tensor | None:
    """Return the weight as floating-point numbers, unpacked where it is quantized, or None.

    None where the host's packing is not known here; the caller then does without.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta:
        return None
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
