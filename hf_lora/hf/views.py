"""The frozen base of a wrapped model, as a model object of its own."""

import copy
from typing import Any

from torch import nn

from hf_lora.hf.instance import uninstall
from hf_lora.layers.base import restore_class
from hf_lora.layers.names import LORA_A, LORA_B, parameter_name
from hf_lora.model.registry import forget, wrapped


def base_view(model: nn.Module) -> Any:
    """Return the frozen base of a wrapped model as a model of its own that shares every tensor.

    It has the model's class and no adapters, is in eval mode, and costs no memory: a reference
    model for TRL's ``DPOTrainer(model=model, ref_model=hf_lora.base_view(model))`` and the like.

    Args:
        model: A wrapped model that is not merged.

    Returns:
        A model of the same class. Its parameters are those of ``model``; training must not touch
        them, and hf_lora does not.

    Raises:
        StateError: The model is not wrapped, or is merged.
    """
    inner, registry = wrapped(model)
    registry.check_unmerged("view the base")
    shared = {id(t): t for module in inner.modules() for t in _tensors(module)}
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


def _tensors(module: nn.Module) -> list[Any]:
    return [
        tensor
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
