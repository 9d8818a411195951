"""Several adapters on one model: add, delete, freeze.

Which adapters are active, which are trained and which are merged are three independent things:
nothing here changes one by way of another.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError, StateError
from hf_lora.layers.names import check_adapter_name
from hf_lora.model.checks import check_gradients, check_plan, warn_of_plan
from hf_lora.model.patch import attach_plan, remove_adapter
from hf_lora.model.registry import Registry, registry_of, wrapped
from hf_lora.model.replacing import check_replaceable, replaced
from hf_lora.model.transaction import Transaction
from hf_lora.peft_names import PeftConfig, is_peft_config
from hf_lora.planning.make import make_plan
from hf_lora.planning.tokens import with_row_numbers


def adapters(model: nn.Module) -> dict[str, LoRAConfig]:
    """Return each adapter's name and configuration, in the order in which they were added.

    Raises:
        StateError: The model is not wrapped.
    """
    return {name: adapter.config for name, adapter in registry_of(model).adapters.items()}


def add_adapter(
    model: nn.Module,
    name: str,
    targets: str | Iterable[str] | LoRAConfig | PeftConfig | None = None,
    *,
    config: LoRAConfig | PeftConfig | None = None,
    trainable: bool = True,
    replace: bool = False,
    tokenizer: Any = None,
    **fields: Any,
) -> nn.Module:
    """Add another adapter to a wrapped model; it is not active until :func:`activate` says so.

    Args:
        model: A wrapped model.
        name: 1 to 64 letters, digits, ``_`` or ``-``.
        targets: As for :func:`hf_lora.wrap`; ranks and layers may differ from other adapters'.
        config: All of it in one object, instead of ``targets`` and ``fields``.
        trainable: Whether its tensors require gradients.
        replace: Whether to put it in the place of an adapter of that name, in use where that was.
            An optimizer that was made before holds the old one's tensors.
        tokenizer: What knows the tokens that ``train_rows`` names.
        **fields: Fields of :class:`hf_lora.LoRAConfig`.

    Returns:
        The same model.

    Raises:
        StateError: Not wrapped, or the name is taken.
        ConfigError, TargetError: As for :func:`hf_lora.wrap`.
    """
    with Transaction(model) as change:
        add(model, name, as_config(targets, config, fields, tokenizer), trainable, replace)
        change.commit()
    return model


def add(
    model: nn.Module, name: str, config: LoRAConfig, trainable: bool = True, replace: bool = False
) -> None:
    """Do what :func:`add_adapter` does, as a part of a change."""
    inner, registry = wrapped(model)
    anew = replace and name in registry.adapters
    if anew:
        check_replaceable(registry, name)
    else:
        check_new_name(registry, name)
    registry.check_in_place(inner)
    registry.settle_buffers()
    plan = make_plan(inner, config, others=registry.adapted())
    check_plan(inner, plan)
    untrainable = check_gradients(inner, plan)
    with replaced(inner, registry, name) if anew else contextlib.nullcontext():
        attach_plan(inner, registry, plan, name)
    if not trainable:
        set_trainable(inner, registry, name, False)
    warn_of_plan(plan, untrainable, stacklevel=3)


def delete_adapter(model: nn.Module, name: str | Iterable[str]) -> nn.Module:
    """Take adapters off the model; layers become what they were where no other uses them.

    Args:
        model: A wrapped model.
        name: One adapter or several: all of them are taken off, or, after an error, none.

    Raises:
        UnknownAdapterError: There is none of one of the names.
        StateError: None would be left (use :func:`hf_lora.unwrap`), one is merged or in use by
            another thread or task, or another library has changed the class of an adapted layer
            again.
    """
    registry = registry_of(model)
    chosen = registry.select(name)
    registry.check_unmerged("delete an adapter", chosen)
    registry.check_classes(*chosen)
    if len(chosen) == len(registry.adapters):
        last = ", ".join(map(repr, chosen))
        what = f"{last} is the last adapter" if len(chosen) == 1 else f"{last} are all adapters"
        raise StateError(f"{what}; hf_lora.unwrap(model) takes it off.")
    if registry.routing.used_elsewhere(chosen):
        raise StateError(
            f"Another thread or task uses {', '.join(chosen)} now, in a use_adapter block; delete "
            "an adapter when nobody does."
        )
    registry.settle_buffers()
    with Transaction(model, "adapted") as change:
        for each in chosen:
            remove_adapter(registry, each)
        change.commit()
    return model


def freeze(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Stop training these adapters; whether they are active does not change."""
    return _set_all(model, names, False)


def unfreeze(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Train these adapters; whether they are active does not change."""
    return _set_all(model, names, True)


def check_new_name(registry: Registry, name: str) -> None:
    """Raise if ``name`` is no name for an adapter, or is taken."""
    check_adapter_name(name)
    if name in registry.adapters:
        raise StateError(
            f"This model has an adapter {name!r} already; give the new one another name, or say "
            "replace=True to put it in the place of the old one."
        )


def as_config(
    targets: str | Iterable[str] | LoRAConfig | PeftConfig | None,
    config: LoRAConfig | PeftConfig | None,
    fields: dict[str, Any],
    tokenizer: Any = None,
) -> LoRAConfig:
    """Return the configuration that a call's arguments stand for, with numbers for tokens.

    Args:
        targets: Patterns; or a whole configuration by position, as people write it.
        config: A whole configuration.
        fields: Fields of one.
        tokenizer: What knows the tokens that it names.

    Raises:
        ConfigError: Several of them are given, or a field is wrong.
    """
    if isinstance(targets, LoRAConfig) or is_peft_config(targets):
        if config is not None:
            raise ConfigError("Two configurations are given; give one.")
        config, targets = targets, None
    from_fields = fields if targets is None else {"targets": targets, **fields}
    if config is None:
        config = LoRAConfig.from_dict(from_fields)
    elif from_fields:
        given = ", ".join(from_fields)
        raise ConfigError(f"Give either config=LoRAConfig(...) or its fields, not both ({given}).")
    elif is_peft_config(config):
        config = LoRAConfig.from_peft(config)
    if not isinstance(config, LoRAConfig):
        raise ConfigError(
            f"config is {config!r}, not a LoRAConfig; see LoRAConfig.from_dict and from_peft."
        )
    return with_row_numbers(config, tokenizer)


def set_trainable(
    model: nn.Module, registry: Registry, name: str, flag: bool, change: Transaction | None = None
) -> None:
    """Do what :func:`freeze` and :func:`unfreeze` do, as a part of a change.

    Args:
        model: The wrapped model itself.
        registry: Its registry.
        name: The adapter.
        flag: Whether it is to train.
        change: Told of the flags first, where it has not noted all of the model's.
    """
    if flag:
        registry.buffers.note(model, registry)
    parameters = [parameter for _, parameter in registry.parameters(name)]
    if change is not None:
        change.keep_flags(parameters)
    (registry.routing.frozen.discard if flag else registry.routing.frozen.add)(name)
    for parameter in parameters:
        parameter.requires_grad_(flag)


def _set_all(model: nn.Module, names: str | Iterable[str], flag: bool) -> nn.Module:
    inner, registry = wrapped(model)
    registry.settle_buffers()
    with Transaction(model, "values") as change:
        for name in registry.select(names):
            set_trainable(inner, registry, name, flag, change)
        change.commit()
    return model
