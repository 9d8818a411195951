"""Several adapters on one model: add, delete, activate, freeze.

Which adapters are active, which are trained and which are merged are three independent things:
nothing here changes one by way of another.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.errors import StateError, listing
from hf_lora.layers.names import check_adapter_name
from hf_lora.model.patch import attach_plan, check_gradients, check_plan, detach
from hf_lora.model.planning import make_plan
from hf_lora.model.registry import Registry, registry_of, wrapped


def adapters(model: nn.Module) -> dict[str, LoRAConfig]:
    """Return each adapter's name and configuration, in the order in which they were added.

    Raises:
        StateError: The model is not wrapped.
    """
    return {name: adapter.config for name, adapter in registry_of(model).adapters.items()}


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are in use, in order.

    Raises:
        StateError: The model is not wrapped.
    """
    return registry_of(model).routing.active


def add_adapter(
    model: nn.Module,
    name: str,
    targets: str | Iterable[str] | None = None,
    *,
    config: LoRAConfig | None = None,
    trainable: bool = True,
    **fields: Any,
) -> nn.Module:
    """Add another adapter to a wrapped model; it is not active until :func:`activate` says so.

    Args:
        model: A wrapped model.
        name: 1 to 64 letters, digits, ``_`` or ``-``.
        targets: As for :func:`hf_lora.wrap`; ranks and layers may differ from other adapters'.
        config: All of it in one object, instead of ``targets`` and ``fields``.
        trainable: Whether its tensors require gradients.
        **fields: Fields of :class:`hf_lora.LoRAConfig`.

    Returns:
        The same model.

    Raises:
        StateError: Not wrapped, merged, or the name is taken.
        ConfigError, TargetError: As for :func:`hf_lora.wrap`.
    """
    inner, registry = wrapped(model)
    check_new_name(registry, name)
    registry.check_unmerged("add an adapter")
    plan = make_plan(inner, as_config(targets, config, fields))
    check_plan(inner, plan)
    check_gradients(inner, [target.path for target in plan.targets])
    attach_plan(inner, registry, plan, name)
    if not trainable:
        freeze(model, name)
    return model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Take an adapter off the model; its layers become what they were if no other uses them.

    Raises:
        UnknownAdapterError: There is none of that name.
        StateError: It is the last one (use :func:`hf_lora.unwrap`), or the model is merged.
    """
    registry = registry_of(model)
    registry.adapter(name)
    registry.check_unmerged("delete an adapter")
    if len(registry.adapters) == 1:
        raise StateError(f"{name!r} is the last adapter; hf_lora.unwrap(model) takes it off.")
    detach(registry, name)
    return model


def activate(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Use these adapters, added up, and no others. One assignment, whatever the model's size.

    Raises:
        UnknownAdapterError: One of the names is unknown; nothing has changed.
        StateError: The model is merged, or two of them train the same module in full.
    """
    registry = registry_of(model)
    registry.check_unmerged("activate another adapter")
    registry.routing.active = _compatible(registry, registry.select(names))
    return model


@contextlib.contextmanager
def use_adapter(model: nn.Module, names: str | Iterable[str]) -> Iterator[nn.Module]:
    """Use these adapters inside a ``with`` block, and then those that were in use before.

    Raises:
        UnknownAdapterError, StateError: As for :func:`activate`.
    """
    routing = registry_of(model).routing
    before = routing.active
    activate(model, names)
    try:
        yield model
    finally:
        routing.active = before


def no_adapter(model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
    """Use the base alone inside a ``with`` block, and then the adapters that were in use before.

    Raises:
        StateError: The model is not wrapped, or is merged.
    """
    return use_adapter(model, ())


def freeze(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Stop training these adapters; whether they are active does not change."""
    return _set_trainable(model, names, False)


def unfreeze(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Train these adapters; whether they are active does not change."""
    return _set_trainable(model, names, True)


def check_new_name(registry: Registry, name: str) -> None:
    """Raise if ``name`` is no name for an adapter, or is taken."""
    check_adapter_name(name)
    if name in registry.adapters:
        raise StateError(
            f"This model has an adapter {name!r} already; give the new one another name, or "
            "delete_adapter the old one."
        )


def as_config(
    targets: str | Iterable[str] | None, config: LoRAConfig | None, fields: dict[str, Any]
) -> LoRAConfig:
    """Return the configuration that a call's arguments stand for.

    Raises:
        ConfigError: Both given, or a field is wrong.
    """
    from_fields = fields if targets is None else {"targets": targets, **fields}
    if config is None:
        return LoRAConfig.from_dict(from_fields)
    if from_fields or not isinstance(config, LoRAConfig):
        given = ", ".join(from_fields) or repr(config)
        raise TypeError(f"Give either config=LoRAConfig(...) or its fields, not both ({given}).")
    return config


def _set_trainable(model: nn.Module, names: str | Iterable[str], flag: bool) -> nn.Module:
    registry = registry_of(model)
    for name in registry.select(names):
        for _, parameter in registry.parameters(name):
            parameter.requires_grad_(flag)
    return model


def _compatible(registry: Registry, names: tuple[str, ...]) -> tuple[str, ...]:
    clashes = []
    for path, module in registry.copies.items():
        both = [name for name in names if name in module.lora_copies]
        if len(both) > 1:
            clashes.append(f"{path}: {', '.join(both)}")
    if clashes:
        raise StateError(
            listing("These adapters train the same modules in full and cannot be added up", clashes)
        )
    return names
