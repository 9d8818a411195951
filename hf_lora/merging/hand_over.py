"""A model's weights as an engine wants them: the base's names, adapters merged, one at a time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from hf_lora.compat.accelerate import present
from hf_lora.compat.dtensor import full_tensor, is_distributed
from hf_lora.errors import TargetError, listing
from hf_lora.files.keys import without_wrappers
from hf_lora.kinds.lora import LoRALayer
from hf_lora.kinds.token_rows import TrainedRows
from hf_lora.layers.biases import Biased
from hf_lora.layers.holding import held_now
from hf_lora.layers.hosts import has_float_weight
from hf_lora.layers.kind import Adaptable, added_names, parameter_of
from hf_lora.layers.merge import with_updates
from hf_lora.layers.quantized import float_weight
from hf_lora.layers.roles import OWN_BIAS
from hf_lora.layers.trained import TrainedModule

Gather = Callable[[Sequence[torch.Tensor]], contextlib.AbstractContextManager[Any]]
"""What puts together tensors that several processes hold, for as long as a block lasts."""


def merged_tensors(
    model: nn.Module, gather: Gather = contextlib.nullcontext
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (the base's name, value with the active adapters merged) for every parameter.

    And for every buffer that these have moved.

    Nothing is written into the model. One merged weight is there at a time; a parameter without an
    update is the model's own tensor. Of tied weights the first name comes alone, as everywhere.
    Quantized weights come in floating point.

    Args:
        model: A model with wrapped layers anywhere in it.
        gather: Called with the tensors that the next value is made of.

    Raises:
        TargetError: A layer has no weight that could say what it does, or two tied layers would
            need different ones; all are named before the first value comes.
    """
    _check(model)
    seen = set()
    for path, module in model.named_modules():
        hidden = added_names(module)
        for name, parameter in module._parameters.items():
            if parameter is None or name in hidden or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            ours = [p for n, p in module._parameters.items() if n in hidden and p is not None]
            with gather([parameter, *ours]), present(module):
                yield without_wrappers(f"{path}.{name}" if path else name), _value(module, name)
        for name, value in held_now(module).items():
            yield without_wrappers(f"{path}.{name}" if path else name), value


@torch.no_grad()
def _value(module: nn.Module, name: str) -> torch.Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    if _is_trained(module, name):
        parameter = module.lora_merged(module.lora_routing.now().live, None)[name]
    elif name == "weight" and (weight := _linear_weight(module)) is not None:
        parameter = weight
        if isinstance(module, LoRALayer) and module.lora_updates():
            parameter = with_updates(module, weight, module.lora_routing.now().live)
    elif _changes(module, name):
        live = module.lora_routing.now().live
        if name == OWN_BIAS and isinstance(module, Biased):
            merged = module.lora_merged_bias(live, None)
        else:
            merged = module.lora_merged(live, None)
        parameter = merged.get(name, parameter)
    return full_tensor(parameter.detach())


def _check(model: nn.Module) -> None:
    problems = []
    first: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        fault = _fault(module) if _has_updates(module) else None
        if isinstance(module, TrainedRows) and _has_rows(module):
            fault = module.lora_merge_fault()
        problems += [f"{path}: {fault}"] if fault else []
        for name, parameter in module._parameters.items():
            if parameter is None or name in added_names(module):
                continue
            change = _change(module, name)
            where, before = first.setdefault(id(parameter), (path, change))
            if change != before:
                problems.append(f"{path}.{name} is tied to that of {where}, and they differ now")
    if problems:
        raise TargetError(
            listing(
                "These weights cannot be handed over with their updates",
                problems,
                "An engine that ties two layers cannot hold different weights for them.",
            )
        )


def _linear_weight(module: nn.Module) -> torch.Tensor | None:
    return None if _is_of_other_kind(module) else float_weight(module)


def _fault(layer: Adaptable) -> str | None:
    if not isinstance(layer, LoRALayer):
        return layer.lora_merge_fault()
    if fault := layer.lora_bias_merge_fault():
        return fault
    weight = parameter_of(layer, "weight")
    if weight is None or (not is_distributed(weight) and has_float_weight(layer)):
        return layer.lora_merge_fault()
    return (
        None
        if float_weight(layer) is not None or is_distributed(weight)
        else layer.lora_merge_fault()
    )


def _change(module: nn.Module, name: str) -> Any:
    """Return what tells a tensor from the base's: the copies in its place, or the layer itself."""
    if _is_trained(module, name) or (isinstance(module, TrainedRows) and name == "weight"):
        return module.lora_made_of(name, module.lora_routing.now().live)
    return id(module) if _changes(module, name) else None


def _changes(module: nn.Module, name: str) -> TypeGuard[Adaptable | TrainedRows]:
    """Say whether an update or rows of an adapter change a tensor, now."""
    if isinstance(module, TrainedRows):
        return name == "weight" and _has_rows(module)
    biased = (OWN_BIAS,) if isinstance(module, Biased) and module.lora_routing.biased else ()
    return _has_updates(module) and name in (
        *(module.lora_parts(module) or module.lora_weights),
        *biased,
    )


def _is_trained(module: nn.Module, name: str) -> TypeGuard[TrainedModule]:
    """Say whether an adapter's copy is read in the place of a tensor, now."""
    return (
        isinstance(module, TrainedModule)
        and name in module.lora_names
        and bool(module.lora_shares(name))
    )


def _is_of_other_kind(module: nn.Module) -> bool:
    return isinstance(module, Adaptable | TrainedRows) and not isinstance(module, LoRALayer)


def _has_rows(module: TrainedRows) -> bool:
    return any(name in module.lora_token_rows for name, _ in module.lora_routing.now().live)


def _has_updates(module: nn.Module) -> TypeGuard[Adaptable]:
    return isinstance(module, Adaptable) and any(
        name in module.lora_slots for name, _ in module.lora_routing.now().live
    )
