"""Leaving a wrapped model for good with its adapters merged into it."""

from typing import Any, TypeVar

from torch import nn

from hf_lora.compat.libraries import is_pretrained
from hf_lora.integrations.model_methods import Bound, Owner
from hf_lora.integrations.own_methods import uninstall
from hf_lora.integrations.save_merged import SaveMerged
from hf_lora.merging.for_good import Later
from hf_lora.merging.in_memory import put_in
from hf_lora.model.choices import Names
from hf_lora.model.patch import unpatch
from hf_lora.model.registry import returned_by_wrap, wrapped
from hf_lora.model.transaction import Transaction

Model = TypeVar("Model", bound=nn.Module)

_METHOD = "save_pretrained"


def merge_and_unwrap(model: Model, names: Names | None = None) -> Model:
    """Merge the active adapters for good and give back a plain model without hf_lora.

    It saves in full and loads anywhere; the base's weights are gone from it. There is no second
    copy of them at any time: what fails does so before the first weight is exchanged, and what
    interrupts after that, such as Ctrl-C, waits until the last is. Of hf_lora a
    transformers model keeps one method: ``save_pretrained`` refuses a folder that holds an adapter,
    which transformers would apply again to what is merged already.

    Args:
        model: A wrapped model.
        names: Adapters to merge instead of the active ones, or a mapping from each to a factor, as
            for :func:`hf_lora.activate`. What is merged already stays so.

    Returns:
        What was wrapped, also if a DDP or compiled wrapper of it is given; of sentence-transformers
        the whole model, as from :func:`hf_lora.wrap`.

    Raises:
        StateError, TargetError, ConfigError: As for :func:`hf_lora.merge`; the model is as it was.
    """
    later = Later()
    with Transaction(model) as change:
        inner = _merge_and_unwrap(model, names, later)
        later.check_room()
        change.finish(lambda: later.finish(inner))
    return returned_by_wrap(model, inner)  # type: ignore[return-value]


def _merge_and_unwrap(model: nn.Module, names: Names | None, later: Later) -> nn.Module:
    inner, registry = wrapped(model)
    if names is not None or not registry.routing.merged:
        put_in(inner, names, later)
    merged = (*registry.merged_before, *registry.routing.merged)
    registry.keep_merged()
    unpatch(inner)
    uninstall(inner, registry)
    if is_pretrained(inner):
        own = inner.__dict__.pop(_METHOD, None)
        mark = _mark(own)
        earlier = own if mark is None else mark.earlier
        inner.__dict__[_METHOD] = Bound(SaveMerged(merged, earlier), Owner(inner))
    return inner


def _mark(method: Any) -> SaveMerged | None:
    found = method.function if isinstance(method, Bound) else None
    return found if isinstance(found, SaveMerged) else None
