"""The methods that hf_lora puts on a wrapped model object, told from everybody else's."""

from torch import nn

from hf_lora.model.patch import unpatch
from hf_lora.model.registry import Registry, registry_of
from hf_lora.model.transaction import Transaction

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


def take_off(model: nn.Module) -> nn.Module:
    """Take every adapter off, and these methods; see :func:`hf_lora.unwrap`."""
    registry = registry_of(model)
    registry.settle_buffers()
    with Transaction(model, "adapted") as change:
        inner = unpatch(model)
        uninstall(inner, registry)
        change.commit()
    return inner
