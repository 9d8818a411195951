"""Packing a model's stacked experts in 4 bits, which its own quantization leaves as they are."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from hf_lora.compat.offload_stores import entry_of
from hf_lora.compat.torch_modules import storage_of
from hf_lora.errors import ConfigError, StateError, TargetError, listing
from hf_lora.functional.packed import PackedStack, pack, unpack
from hf_lora.integrations import wrapped_inside
from hf_lora.kinds.experts import LoRAExperts
from hf_lora.kinds.packed_experts import is_packed, packed_class
from hf_lora.layers.kind import Patched, parameter_of
from hf_lora.layers.probe import host_class

Model = TypeVar("Model", bound=nn.Module)

KINDS = ("nf4", "fp4")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_experts(model: Model, *, kind: str = "nf4", block: int = 64) -> Model:
    """Pack every layer of stacked experts in 4 bits, in place, one expert at a time.

    transformers keeps the experts of a layer in two parameters, which quantizers of linear layers
    pass over: of a mixture of experts nearly all weights stay in 16 bits. Packed they take 0.28 of
    that (4.5 bits each). In a forward only experts that have rows are unpacked, one by one.
    Adapters train on top as on any other base; the model must not be wrapped yet.

    Beside the model this takes the memory of one packed stack at a time.

    Args:
        model: A model with experts that declare how they are stacked, its weights in memory.
        kind: ``"nf4"``, whose 16 numbers fit normally distributed weights, or ``"fp4"``.
        block: How many numbers share one scale in 32 bits: a power of 2 from 32 to 4,096.

    Returns:
        The same model. It can be trained with adapters and used; to be saved as a whole it has to
        be unpacked (:func:`dequantize_experts`).

    Raises:
        ConfigError: ``kind`` or ``block`` is none of these.
        TargetError: There are no such experts, or some cannot be packed; each is named.
        StateError: The model is wrapped.
        ImportError: bitsandbytes is missing.

    The model is as it was after any of these.

    Example:
        >>> model = hf_lora.quantize_experts(model)
        >>> model = hf_lora.wrap(model, targets=["experts", "attention"])

    Source: QLoRA (Dettmers et al., 2023); the numbers are bitsandbytes'.
    """
    if kind not in KINDS or block not in _BLOCKS:
        raise ConfigError(
            f"kind={kind!r}, block={block!r}: kind is one of {', '.join(KINDS)}, and block one of "
            f"{', '.join(map(str, _BLOCKS))}."
        )
    found = {path: module for path, module in _layers(model) if not is_packed(module)}
    _check(model, found)
    for module in found.values():
        for part in LoRAExperts.lora_parts(module):
            stack = parameter_of(module, part)
            assert stack is not None
            module._parameters[part] = pack(stack, kind, block)
            del stack  # let go of before the next is packed
        module.__class__ = packed_class(type(module))
    wrapped_inside.install()
    return model


def dequantize_experts(model: Model) -> Model:
    """Undo :func:`quantize_experts`: plain stacks again, with what 4 bits have left of them.

    Raises:
        TargetError: There are no packed experts.
        StateError: The model is wrapped.
    """
    found = [module for _, module in _layers(model) if is_packed(module)]
    if not found:
        raise TargetError("This model has no experts that quantize_experts has packed.")
    _check_bare(found)
    for module in found:
        for part in LoRAExperts.lora_parts(module):
            stack = parameter_of(module, part)
            assert isinstance(stack, PackedStack)
            module._parameters[part] = nn.Parameter(unpack(stack), requires_grad=False)
        module.__class__ = type(module).packed_host  # type: ignore[attr-defined]
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if LoRAExperts.lora_takes(module):
            yield path, module


def _check_bare(modules: list[nn.Module]) -> None:
    if any(isinstance(module, Patched) for module in modules):
        raise StateError(
            "The experts of this model have adapters. Save these, unwrap the model, change its "
            "experts and load the adapters again: hf_lora.save, hf_lora.unwrap, hf_lora.load."
        )


def _check(model: nn.Module, found: dict[str, nn.Module]) -> None:
    if not found:
        packed = any(is_packed(module) for module in model.modules())
        why = "are packed already" if packed else "declare how they are stacked: there are none"
        raise TargetError(f"This model has no experts to pack: those that it has {why}.")
    _check_bare([*found.values()])
    problems, tried = [], {}
    seen: dict[int, str] = {}
    for path, module in found.items():
        fault = LoRAExperts.lora_fault(module) or _fault(module)
        key = None if fault else LoRAExperts.lora_probe_key(module)
        if key is not None:
            if key not in tried:
                tried[key] = LoRAExperts.lora_gradient_fault(module)
            fault = tried[key]
        for part in LoRAExperts.lora_parts(module):
            stack = parameter_of(module, part)
            if stack is not None and not stack.is_meta:
                other = seen.setdefault(storage_of(stack), path)
                fault = fault or (f"it shares {part} with {other}" if other != path else None)
        if fault:
            problems.append(f"{path} ({host_class(module).__name__}): {fault}")
    if problems:
        raise TargetError(listing("These experts cannot be packed", problems))


def _fault(module: nn.Module) -> str | None:
    for part in LoRAExperts.lora_parts(module):
        stack = parameter_of(module, part)
        assert stack is not None
        if stack.is_meta or entry_of(module, part) is not None:
            return f"its {part} is not in memory"
        if stack.dtype not in _TYPES:
            return f"its {part} is {stack.dtype}, which is none of those that can be packed"
    return None
