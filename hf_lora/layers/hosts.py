"""Questions about a module that may be adapted: its sizes, its numbers, and why it cannot be."""

import numbers
from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.dtensor import is_sharded
from hf_lora.compat.quantized_layers import is_compressed
from hf_lora.config import LoRAConfig
from hf_lora.layers.instance_forward import has_foreign_forward
from hf_lora.layers.kind import Adaptable, Patched, parameter_of
from hf_lora.layers.names import DEFAULT, LORA_A, LORA_B, parameter_name
from hf_lora.layers.registered import registered
from hf_lora.layers.tensor_parallel import split_fault

_SIZES = ("in_features", "out_features")
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear-like module as it declares them, or None.

    Never read from the weight, which may be packed, quantized or one rank's share.
    """
    own = type(module) if isinstance(module, Adaptable) else registered(module)
    if own is not None:
        return own.lora_widths(module)
    declared = vars(module)
    # most are asked of often, and need none of what follows
    if type(module) is nn.Linear and _SIZES[0] in declared and _SIZES[1] in declared:
        return int(module.in_features), int(module.out_features)
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    # its own, not what a wrapper (checkpointing's, say) forwards from the layer inside it
    compiled = isinstance(module, torch.jit.ScriptModule)  # keeps its attributes elsewhere
    own = [n for n in _SIZES if compiled or n in declared or hasattr(type(module), n)]
    if not own:
        return None
    sizes = [getattr(module, name, None) for name in own]
    if not callable(getattr(module, "forward", None)):
        return None
    whole = [int(size) for size in sizes if isinstance(size, numbers.Integral)]
    return (whole[0], whole[1]) if len(whole) == len(_SIZES) else None


def has_float_weight(module: nn.Module) -> bool:
    """Say whether the weight is an ordinary floating-point tensor: neither packed nor quantized."""
    weight = parameter_of(module, "weight")
    return weight is not None and is_float_weight(weight)


def is_float_weight(weight: torch.Tensor, *, shards: bool = True) -> bool:
    """Say whether a weight is an ordinary floating-point tensor, or a shard of one."""
    return (
        (type(weight) is nn.Parameter or (shards and _is_shard(weight)))
        and weight.is_floating_point()
        and weight.dtype.itemsize >= 2  # in 8 bits a weight comes with a scale that is kept apart
        and not hasattr(weight, "quant_state")
    )


def _is_shard(weight: torch.Tensor) -> bool:
    """Say whether a tensor is a DTensor of ordinary numbers."""
    if not is_sharded(weight):
        return False
    with torch.no_grad():
        return type(weight.to_local()) is torch.Tensor  # type: ignore[operator]


def chosen_dtype(config: LoRAConfig | None) -> torch.dtype | None:
    """Return the type that a configuration asks for, or None."""
    return getattr(torch, config.dtype) if config is not None and config.dtype else None


def adapter_dtype(module: nn.Module) -> torch.dtype:
    """Return the type an adapter has by default: the base's own, or float32 if that is too coarse.

    In 16 bits an update smaller than half a unit in the last place rounds away; on a quantized
    base the type of the storage says nothing.
    """
    weight = parameter_of(module, "weight")
    if weight is None and any(
        p.dtype == torch.float64 for p in module._parameters.values() if p is not None
    ):
        return torch.float64
    if weight is None or not has_float_weight(module) or weight.dtype in SIXTEEN_BIT:
        return torch.float32
    return weight.dtype


def why_not(module: nn.Module) -> str | None:
    """Return the reason why a module cannot get a low-rank update, or None if it can.

    Looks at the module only: whether gradients pass through it is found out by trying it
    (``layers.probe``), and whether its parent calls it at all is for ``layers.uncalled`` to say.
    """
    sizes = features(module)
    name = type(module).__name__
    if sizes is None:
        return f"{name} is not a linear layer"
    if min(sizes) < 1:
        return f"{name} has no sizes yet (in={sizes[0]}, out={sizes[1]})"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{name} is compiled by TorchScript"
    weight = module._parameters["weight"] if has_float_weight(module) else None
    if weight is not None and sorted(shape_of(weight)) != sorted(sizes):
        return (
            f"the weight of this {name} has shape {shape_of(weight)}, "
            f"which is not one matrix of in={sizes[0]} and out={sizes[1]}"
        )
    fault = split_fault(module)
    if fault:
        return fault
    if has_foreign_forward(module) and is_compressed(module):
        return (
            f"compressed-tensors has put a forward of its own on this {name}; load the base with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    if has_foreign_forward(module):
        return f"the forward of this {name} was replaced on the instance, which would hide LoRA"
    if not isinstance(module, Patched) and taken_names(module, DEFAULT, (LORA_A, LORA_B)):
        return f"{name} has a {LORA_A} already: another library's adapter is on it"
    return None


def taken_names(module: nn.Module, adapter: str, kinds: Iterable[str]) -> list[str]:
    """Return the names that an adapter's tensors would get and that the module has already."""
    names = [parameter_name(kind, adapter) for kind in kinds]
    return [name for name in names if hasattr(module, name)]


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
