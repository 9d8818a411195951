"""Questions about a module that may be adapted: its sizes, its numbers, and why it cannot be."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.devices import execution_device

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear-like module as it declares them, or None.

    Never read from the weight, which may be packed, quantized or one rank's share.
    """
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in sizes) and callable(getattr(module, "forward", None)):
        return sizes  # type: ignore[return-value]
    return None


def has_float_weight(module: nn.Module) -> bool:
    """Say whether the weight is an ordinary floating-point tensor: neither packed nor quantized."""
    weight = module._parameters.get("weight")
    return (
        weight is not None and type(weight) is nn.Parameter and weight.is_floating_point()
    ) and not hasattr(weight, "quant_state")


def adapter_dtype(module: nn.Module) -> torch.dtype:
    """Return the type an adapter has by default: the base's own, or float32 if that is too coarse.

    In 16 bits an update smaller than half a unit in the last place rounds away; on a quantized
    base the type of the storage says nothing.
    """
    weight = module._parameters.get("weight")
    if weight is None or not has_float_weight(module) or weight.dtype in _SIXTEEN_BIT:
        return torch.float32
    return weight.dtype if weight.dtype.itemsize >= 4 else torch.float32


def why_not(module: nn.Module) -> str | None:
    """Return the reason why a module cannot get a low-rank update, or None if it can.

    Looks at the module only; whether gradients pass through it is asked by :func:`gradient_fault`.
    """
    sizes = features(module)
    name = type(module).__name__
    if sizes is None:
        return f"{name} is not a linear layer"
    if min(sizes) < 1:
        return f"{name} has no sizes yet (in={sizes[0]}, out={sizes[1]})"
    if "forward" in module.__dict__ and not hasattr(module, "_old_forward"):
        return f"the forward of this {name} was replaced on the instance, which would hide LoRA"
    return None


def rank_fault(module: nn.Module, r: int) -> str | None:
    """Return what is wrong with rank ``r`` on this module, or None."""
    sizes = features(module)
    assert sizes is not None
    if r > min(sizes):
        return (
            f"r={r} is larger than the layer's smaller side, {min(sizes)} "
            f"(in={sizes[0]}, out={sizes[1]})"
        )
    return None


def gradient_fault(module: nn.Module) -> str | None:
    """Run the host once on a row of zeros and say why no gradient reaches its input, or None.

    Some quantized layers are made for inference only: below such a layer nothing would train.
    """
    sizes = features(module)
    assert sizes is not None
    with torch.enable_grad():
        x = torch.zeros(
            1, sizes[0], dtype=_input_dtype(module), device=execution_device(module)
        ).requires_grad_()
        try:
            y = module(x)
            reaches = y.requires_grad and torch.autograd.grad(y.sum(), x)[0] is not None
        except (RuntimeError, NotImplementedError, TypeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return f"its backward fails: {first}"
    if reaches:
        return None
    return "its backward gives no gradient to its input, so nothing below it would train"


def _input_dtype(module: nn.Module) -> torch.dtype:
    """Return a type that the module takes: its compute type, its bias's, or its weight's."""
    declared = getattr(module, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    for tensor in (module._parameters.get("bias"), module._parameters.get("weight")):
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
