"""What hf_lora knows of transformers' inside: how it marks what a load filled. Seen in 5.24.

``from_pretrained`` marks each Parameter that it fills. What the checkpoint lacks is drawn, and has
no mark. Every module that is drawn or loaded is marked as well, once it is: a module without a mark
inside a model with one was put there afterwards (dequantized, pruned, fused). The marks live on the
objects: they follow a model to another device or type and into a pickle, and ``copy.deepcopy``
loses those of Parameters.
"""

import inspect
import sys
from typing import Any

import torch.distributed as dist
from torch import nn

_MARK = "_is_hf_initialized"
_CONVERSIONS = "_weight_conversions"
_AVERAGED = "_replicated_grad_hook_registered"

COMPUTES_LOCALLY = "_hf_quantized_needs_local_tp"
"""What transformers calls a module that is given plain tensors, its own part of each, also in
training. It marks quantized layers so; without it, training runs on DTensors."""


def is_pretrained(model: Any) -> bool:
    """Say whether a model is a transformers ``PreTrainedModel``.

    Whoever has one has imported its class, which takes seconds; nobody else should pay for it.
    """
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def is_filled(parameter: nn.Parameter) -> bool:
    """Say whether a checkpoint filled a Parameter, as ``core_model_loading`` marks it."""
    return bool(getattr(parameter, _MARK, False))


def mark_filled(parameter: nn.Parameter) -> None:
    """Mark a Parameter as one that has its values.

    Without it transformers draws it again when it initializes what a load has left unfilled.
    """
    setattr(parameter, _MARK, True)


def is_initialized(module: nn.Module) -> bool:
    """Say whether transformers has drawn or loaded a module: ``_initialize_weights`` marks it."""
    return bool(vars(module).get(_MARK, False))


def was_loaded(model: nn.Module) -> bool:
    """Say whether ``from_pretrained`` made a model, or the one that it is a copy of."""
    return _CONVERSIONS in vars(model)


def is_of_its_checkpoint(model: Any, cls: type) -> bool:
    """Say whether the checkpoint was saved from ``cls``, the class of ``model``, or does not say.

    ``config.architectures`` is written by ``save_pretrained`` and kept by a load.
    """
    saved_from = getattr(getattr(model, "config", None), "architectures", None)
    return not saved_from or cls.__name__ in saved_from


def is_backbone(cls: type) -> bool:
    """Say whether a class is what AutoModel loads, and computes no loss: nothing of a task's."""
    names = sys.modules["transformers"].models.auto.modeling_auto.MODEL_MAPPING_NAMES.values()
    known = {name for each in names for name in ((each,) if isinstance(each, str) else each)}
    taken = inspect.signature(cls.forward).parameters.keys()
    return cls.__name__ in known and not {"labels", "return_loss"} & taken


def classes_in(loader: str, config: Any) -> Any:
    """Return what an auto class makes of a configuration: a class, several, or None.

    The public mappings have no names for some.
    """
    auto: Any = getattr(sys.modules["transformers"], loader)
    return auto._model_mapping.get(type(config), None)


def way_to_stack_experts(model_type: str) -> str | None:
    """Return the model type as whose experts transformers stacks those of another one.

    Without it PEFT's names for experts could not be told from those of dense layers.
    """
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    return _MODEL_TO_CONVERSION_PATTERN.get(model_type)


def averages_itself(parameter: nn.Parameter) -> bool:
    """Say whether Trainer takes the mean of a Parameter's gradient over the processes.

    It marks those of a model that ``from_pretrained`` has split; without the mark they would be
    averaged twice.
    """
    return hasattr(parameter, _AVERAGED)


def loads_on_first_only() -> bool:
    """Say whether only the first process loads weights, and the others mark all as filled.

    So it is with FSDP's ``cpu_ram_efficient_loading``.
    """
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and dist.is_initialized() and bool(module.is_fsdp_enabled())
