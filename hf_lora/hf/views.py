"""The frozen base of a wrapped model, as a model object of its own."""

import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_lora.errors import StateError
from hf_lora.hf.instance import uninstall
from hf_lora.layers.base import restore_class
from hf_lora.layers.names import LORA_A, LORA_B, parameter_name
from hf_lora.model.registry import forget, wrapped
from hf_lora.sharding import is_spread

_DEPTH = 4
"""A module's fields, an object or dict among them, and one more inside (double quantization)."""


def base_view(model: nn.Module) -> Any:
    """Return the frozen base of a wrapped model as a model of its own that shares every tensor.

    It has the model's class and no adapters, is in eval mode, and costs no memory: a reference
    model for TRL's ``DPOTrainer(model=model, ref_model=hf_lora.base_view(model))`` and the like.
    Make it before the trainer. To go on from a trained adapter, whose own start is the reference,
    use TRL's ``precompute_ref_log_probs=True`` instead.

    Args:
        model: A wrapped model that is not merged.

    Returns:
        A model of the same class. Its parameters are those of ``model``; training must not touch
        them, and hf_lora does not.

    Raises:
        StateError: The model is not wrapped, is merged, is spread over several processes, or has a
            forward that another library put on the object and that would lead back to the model
            with its adapters.
    """
    inner, registry = wrapped(model)
    registry.check_unmerged("view the base")
    if is_spread(inner):
        raise StateError(
            "This model is spread over several processes, and what spreads it fetches the weights "
            "for this one object. Use hf_lora.no_adapter(model) instead."
        )
    _check_forwards(inner)
    shared = {id(t): t for module in inner.modules() for t in _tensors(vars(module), _DEPTH)}
    view = copy.deepcopy(inner, shared)
    copied = forget(view)
    for name, adapter in copied.adapters.items():
        for path in adapter.slots:
            for kind in (LORA_A, LORA_B):
                del copied.layers[path]._parameters[parameter_name(kind, name)]
    for module in copied.copies.values():
        for adapter in list(module.lora_copies):
            module.lora_remove_copy(adapter)
    for module in (*copied.layers.values(), *copied.copies.values()):
        restore_class(module)
    uninstall(view)
    return view.eval()


def _check_forwards(model: nn.Module) -> None:
    """Raise if a copy of some module would still call the original, adapters and all.

    A function's closure is not copied with the object that carries the function.
    """
    modules = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        function = getattr(module.__dict__.get("forward"), "__func__", None)
        for cell in getattr(function, "__closure__", None) or ():
            held = cell.cell_contents
            owner = held.__self__ if isinstance(held, types.MethodType) else held
            if id(owner) in modules:
                where = path or f"this {type(model).__name__}"
                raise StateError(
                    f"The forward of {where} was replaced by {function.__module__}, and a view "  # type: ignore[union-attr]
                    "would call it with the adapters; call hf_lora.base_view(model) before the "
                    "trainer is made."
                )


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    """Yield the tensors in a module's fields, also those that quantizers keep beside the weight."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, nn.Module):
        inside = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if isinstance(inside, dict):
            for each in list(inside.values()):
                yield from _tensors(each, depth - 1)
