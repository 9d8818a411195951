"""Several adapters on one model: add, delete, activate, freeze.

Which adapters are active, which are trained and which are merged are three independent things:
nothing here changes one by way of another.

The choice of active adapters belongs to the model, not to a thread: threads that need different
adapters at the same time need a model each.
"""

import dataclasses
import types
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError, HfLoRAWarning, StateError, listing
from hf_lora.layers.names import check_adapter_name
from hf_lora.model.patch import attach_plan, check_gradients, check_plan, detach, tell
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
    registry.check_in_place(inner)
    plan = make_plan(inner, as_config(targets, config, fields))
    check_plan(inner, plan)
    untrainable = check_gradients(inner, plan)
    attach_plan(inner, registry, plan, name)
    if not trainable:
        freeze(model, name)
    tell(plan, untrainable, stacklevel=2)
    return model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Take an adapter off the model; its layers become what they were if no other uses them.

    Raises:
        UnknownAdapterError: There is none of that name.
        StateError: It is the last one (use :func:`hf_lora.unwrap`), the model is merged, or another
            library has changed the class of an adapted layer again.
    """
    registry = registry_of(model)
    registry.adapter(name)
    registry.check_unmerged("delete an adapter")
    registry.check_classes(name)
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
    registry.routing.active = _choice(registry, names)
    return model


def use_adapter(model: nn.Module, names: str | Iterable[str]) -> "Use":
    """Use these adapters inside a ``with`` block, and then those that were in use before.

    Blocks may be nested, entered again, and left in any order: when the last one is left the model
    is back at what was in use before the first.

    Raises:
        UnknownAdapterError, StateError: As for :func:`activate`.

    Example:
        >>> model = hf_lora.wrap(nn.Sequential(nn.Linear(4, 4)), targets="0", r=2)
        >>> with hf_lora.use_adapter(model, []):
        ...     hf_lora.active_adapters(model)
        ()
    """
    return Use(model, names)


def no_adapter(model: nn.Module) -> "Use":
    """Use the base alone inside a ``with`` block, and then the adapters that were in use before.

    Raises:
        StateError: The model is not wrapped, or is merged.
    """
    return Use(model, ())


class Use:
    """A choice of adapters for the time of a ``with`` block; see :func:`use_adapter`."""

    def __init__(self, model: nn.Module, names: str | Iterable[str]):
        self._model = model
        self._registry = registry_of(model)
        self._names = _choice(self._registry, names)
        self._entered = False

    def __enter__(self) -> nn.Module:
        """Use the adapters of this block."""
        registry = self._registry
        chosen = _choice(registry, self._names)  # the model may have changed since
        registry.blocks.append(_Block(self, registry.routing.active))
        registry.routing.active = chosen
        self._entered = True
        return self._model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Use what was in use before, or, if later blocks are still open, leave it to them."""
        registry = self._registry
        at = max(i for i, block in enumerate(registry.blocks) if block.use is self)
        before = registry.blocks.pop(at).before
        if at < len(registry.blocks):
            registry.blocks[at].before = before
        else:
            # an adapter may have been deleted inside the block
            registry.routing.active = tuple(n for n in before if n in registry.adapters)

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):
            warnings.warn(
                "use_adapter and no_adapter do nothing outside of a with statement; "
                "hf_lora.activate(model, names) switches for good.",
                HfLoRAWarning,
                stacklevel=2,
            )


@dataclasses.dataclass
class _Block:
    use: Use
    before: tuple[str, ...]
    """What was active when the block was entered."""


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
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"config is {config!r}, not a LoRAConfig; see LoRAConfig.from_dict.")
    if from_fields:
        given = ", ".join(from_fields)
        raise ConfigError(f"Give either config=LoRAConfig(...) or its fields, not both ({given}).")
    return config


def _set_trainable(model: nn.Module, names: str | Iterable[str], flag: bool) -> nn.Module:
    registry = registry_of(model)
    for name in registry.select(names):
        for _, parameter in registry.parameters(name):
            parameter.requires_grad_(flag)
    return model


def check_compatible(registry: Registry, names: tuple[str, ...]) -> None:
    """Raise StateError if two of these adapters train the same module in full."""
    clashes = []
    if len(set(names)) > 1:
        for path, module in registry.copies.items():
            both = [name for name in module.lora_copies if name in names]
            if len(both) > 1:
                clashes.append(f"{path}: {', '.join(both)}")
    if clashes:
        raise StateError(
            listing("These adapters train the same modules in full and cannot be added up", clashes)
        )


def _choice(registry: Registry, names: str | Iterable[str]) -> tuple[str, ...]:
    """Return these names as adapters that can be used together, now."""
    registry.check_unmerged("activate another adapter")
    chosen = registry.select(names)
    check_compatible(registry, chosen)
    return chosen
