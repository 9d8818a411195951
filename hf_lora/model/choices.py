"""Which adapters a model uses, and how strongly: for all threads, or inside a ``with`` block.

:func:`activate` sets what every thread sees. What :func:`use_adapter` and :func:`no_adapter` choose
is local to the thread or asyncio task that enters the block: others go on as they were.
"""

import math
import numbers
import types
import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from hf_lora.errors import ConfigError, HfLoRAWarning, StateError, listing
from hf_lora.layers.choice import STACK, Block, Weights, leave
from hf_lora.layers.roles import OWN_BIAS
from hf_lora.model.registry import Registry, registry_of, wrapped
from hf_lora.planning.unfilled import find_unfilled
from hf_lora.targets import inside

Names = str | Iterable[str] | Mapping[str, float]
"""One adapter, several, or each with a factor for its update."""


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are in use here, in order.

    Raises:
        StateError: The model is not wrapped.
    """
    return registry_of(model).routing.active


def activate(model: nn.Module, names: Names) -> nn.Module:
    """Use these adapters, added up, and no others. One assignment, whatever the model's size.

    It is what all threads see that are in no block of :func:`use_adapter`. Called inside such a
    block it changes what the block uses, and ends with it.

    Args:
        model: A wrapped model.
        names: One adapter, several, or a mapping from each to a factor: ``{"a": 0.7, "b": 0.3}`` is
            0.7 of one and 0.3 of the other, ``{"a": 0.5}`` half of it. A factor may be negative;
            with 0 an adapter is not in use. Modules that are trained in full are mixed likewise:
            half of an adapter is half-way from the base's values to its own, but a fresh head, of
            which the base has nothing, is used as it is.

    Raises:
        UnknownAdapterError: One of the names is unknown; nothing has changed.
        ConfigError: A factor is no finite number.
        StateError: Adapters are merged that are not among these, just so; or several train the same
            module in full and are no mean of each other (factors that add up to 1).
    """
    inner, registry = wrapped(model)
    registry.settle_buffers()
    registry.routing.choose(_choice(inner, registry, names))
    return model


def use_adapter(model: nn.Module, names: Names) -> "Use":
    """Use these adapters inside a ``with`` block, and then those that were in use before.

    Only the thread or asyncio task that enters the block uses them, and what it awaits; so threads
    can use different adapters of one model at the same time. A thread that is started inside the
    block begins anew, without it (as the one that a streamer's ``generate`` runs in). Give it the
    block's context: ``Thread(target=contextvars.copy_context().run, args=(function, ...))``;
    ``asyncio.to_thread`` does that by itself.

    Blocks may be nested, entered again, and left in any order: when the last one is left the model
    is back at what was in use before the first. Layers under activation checkpointing use what
    their forward used, wherever the backward pass runs.

    Args:
        model: A wrapped model.
        names: As for :func:`activate`.

    Raises:
        UnknownAdapterError, ConfigError, StateError: As for :func:`activate`.

    Example:
        >>> model = hf_lora.wrap(nn.Sequential(nn.Linear(4, 4)), targets="0", r=2)
        >>> with hf_lora.use_adapter(model, []):
        ...     hf_lora.active_adapters(model)
        ()
    """
    return Use(model, names)


def no_adapter(model: nn.Module) -> "Use":
    """Use the base alone inside a ``with`` block, and then the adapters that were in use before.

    Local to the thread or task, as :func:`use_adapter` is.

    Raises:
        StateError: The model is not wrapped, or is merged.
    """
    return Use(model, ())


class Use:
    """A choice of adapters for the time of a ``with`` block; see :func:`use_adapter`."""

    def __init__(self, model: nn.Module, names: Names):
        self._model = model
        self._inner, self._registry = wrapped(model)
        self._chosen = _choice(self._inner, self._registry, names)
        self._blocks: list[Block] = []
        self._entered = False

    def __enter__(self) -> nn.Module:
        """Use the adapters of this block."""
        self._registry.settle_buffers()
        # the model may have changed since
        chosen = _choice(self._inner, self._registry, dict(self._chosen))
        self._blocks.append(self._registry.routing.block(chosen))
        self._entered = True
        return self._model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Use what was in use before, or, if later blocks are still open, leave it to them."""
        here = {frame.block for frame in STACK.get(())}
        # several threads may have entered; one that a generator was entered in may be gone
        block = next((b for b in reversed(self._blocks) if b in here), self._blocks[-1])
        self._blocks.remove(block)
        if block in here:
            self._registry.settle_buffers()
        leave(block)

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):
            warnings.warn(
                "use_adapter and no_adapter do nothing outside of a with statement; "
                "hf_lora.activate(model, names) switches for good.",
                HfLoRAWarning,
                stacklevel=2,
            )


def weigh(registry: Registry, names: Names) -> Weights:
    """Return known adapters, each once, with the factor that is asked of it; none is zero.

    Raises:
        UnknownAdapterError: There is none of one of the names.
        ConfigError: A factor is no finite number.
    """
    if not isinstance(names, Mapping):
        return tuple((name, 1.0) for name in registry.select(names))
    registry.select(list(names))
    wrong = [f"{name!r}: {factor!r}" for name, factor in names.items() if not _is_factor(factor)]
    if wrong:
        raise ConfigError(listing("An adapter is weighed by a finite number, such as 0.5", wrong))
    return tuple((name, float(factor)) for name, factor in names.items() if factor)


def _is_factor(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _choice(model: nn.Module, registry: Registry, names: Names) -> Weights:
    """Return these names as adapters that can be used together, now."""
    chosen = weigh(registry, names)
    note_fresh(model, registry, chosen)
    merged = registry.routing.standing.merged
    if not set(merged) <= set(chosen):  # what is in the weights is in use
        registry.check_unmerged("activate another adapter")
    check_compatible(registry, chosen, merged)
    return chosen


def note_fresh(model: nn.Module, registry: Registry, chosen: Weights) -> None:
    """Tell modules that are trained in full whether the base has anything to mix them with."""
    if registry.exclusive and any(factor != 1.0 for _, factor in chosen):
        needed = find_unfilled(model).needed
        for path, module in registry.exclusive.items():
            if module.lora_fresh != inside(path, needed):
                module.lora_fresh = not module.lora_fresh


def check_compatible(registry: Registry, chosen: Weights, merged: Weights = ()) -> None:
    """Raise StateError if modules that are trained in full cannot be mixed so.

    Args:
        registry: The model's.
        chosen: The adapters in use.
        merged: Those inside the weights, now or soon; they count once.
    """
    clashes = []
    factors = dict(chosen) | dict(merged)
    inside = dict(merged)
    for path, module in (*registry.exclusive.items(), *registry.rows.items()):
        shares = {name: factors[name] for name in module.lora_adapters() if name in factors}
        clash = module.lora_clash(shares, inside)
        if clash is not None:
            clashes.append(f"{path}: {', '.join(shares)}" + (f" ({clash})" if clash else ""))
    biased = {n for n, roles in registry.routing.biased.items() if OWN_BIAS in roles}
    if biased & factors.keys() & inside.keys() and biased & factors.keys() - inside.keys():
        names = ", ".join(sorted(biased & factors.keys()))
        clashes.append(f"biases of the layers: {names} (some of them merged, and some not)")
    if registry.buffers.holding:
        clashes += registry.buffers.clashes(factors, inside)
    if clashes:
        raise StateError(
            listing(
                "These adapters train the same modules, or move the same buffers, and cannot be "
                "added up",
                clashes,
                "Use one of them, or a mean: {'a': 0.7, 'b': 0.3}.",
            )
        )
