"""The methods that hf_lora puts on a wrapped model object, told from everybody else's."""

from torch import nn

from hf_lora.model.registry import Registry

FLAG = "_hf_peft_config_loaded"
"""What transformers asks before it trains a quantized base."""


class OwnMethod:
    """A function of ours that stands on a model object as a method of it."""


def uninstall(model: nn.Module, registry: Registry | None = None) -> None:
    """Give the model its class's own methods back, or those that it had for itself."""
    for name, value in list(vars(model).items()):
        if isinstance(value, OwnMethod) or name == FLAG:
            del model.__dict__[name]
    if registry is not None:
        model.__dict__.update(registry.methods)
