"""Whether every step of a run reaches every adapter tensor, so that DDP need not search for it.

Trainer has DDP walk the graph of each forward for parameters that were not used, and DDP warns if
it finds none. Without the search a parameter that is not reached is an error, so it is left out
only where the model's own code can be relied upon to use all of its layers for every batch.
"""

from typing import Any

from torch import nn

from hf_lora.model.registry import Registry

_WHOLE = (
    "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration",
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip
"""How the names of models end whose loss depends on every layer that they have."""

# Words in the names of settings that make a model choose among its layers.
_CHOICES = ("expert", "layerdrop", "layer_drop", "drop_path", "stochastic_depth")


def reaches_all(model: nn.Module, registry: Registry) -> bool:
    """Say whether each forward of ``model`` is known to use everything that trains."""
    kind = type(model)
    config = getattr(model, "config", None)
    known = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(_WHOLE)
    # several parts, such as an image encoder, that a batch may have nothing for
    if not known or getattr(config, "sub_configs", None) or _chooses(config):
        return False
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    active = {id(p) for name in registry.routing.active for _, p in registry.parameters(name)}
    return trains <= active and not _head_is_patched(model, registry)


def _head_is_patched(model: nn.Module, registry: Registry) -> bool:
    """Say whether the output head has an adapter: a fused loss reads its weight without a call."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return any(module is head for module in registry.modules.values())


def _chooses(config: Any) -> bool:
    settings = vars(config).items() if config is not None else ()
    return any(
        isinstance(value, (int, float)) and value > 0 and any(word in name for word in _CHOICES)
        for name, value in settings
    )
