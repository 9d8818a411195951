"""What is checked of a wrapped model about to train, and of its gradients and optimizer then."""

import dataclasses
import warnings
from typing import Any

import torch
from torch import nn

from hf_lora.compat.dtensor import is_distributed
from hf_lora.errors import GradientError, HfLoRAWarning, StateError, listing
from hf_lora.layers.kind import Adaptable
from hf_lora.layers.tensor_parallel import to_local
from hf_lora.model.places import adapted_twice
from hf_lora.model.registry import Registry
from hf_lora.model.unfrozen import adopt_unfrozen

_REASONS = (
    "Usual reasons: the loss does not depend on the adapted layers (a fused loss, such as TRL's, "
    "reads the output head's weight and never calls the layer), the forward ran under "
    "torch.no_grad, or reentrant checkpointing without model.enable_input_require_grads()."
)
_HEAD = (
    "the output head: a fused loss, such as TRL's or Liger's, reads its weight and never calls the "
    "layer. Do not target the head, train it in full with train=[...], or turn the fused loss off"
)
_STALE = (
    "Usual reason: its groups were made from another model object, before the model was unwrapped "
    "and wrapped again, or for a model that model_init has made anew since. Call "
    "hf_lora.optimizer_groups on the very model that trains, once it is as it shall train."
)
_LATER = (
    "Usual reason: an adapter was added, loaded or unfrozen after the groups were made. Make them "
    "afterwards, or freeze what shall not train."
)


def check_ready(model: nn.Module, registry: Registry, args: Any) -> None:
    """Raise if training this model with these arguments would change nothing, or the base.

    Raises:
        GradientError: Everything is frozen, or what is not is not active.
        StateError: The model is merged, or TRL would write into the reference model, or parameters
            of the base were unfrozen that no file could hold.

    Warns:
        HfLoRAWarning: An adapter trains at another strength than it is saved and loaded with.
    """
    registry.check_unmerged("train")
    if getattr(args, "sync_ref_model", False):
        raise StateError(
            "sync_ref_model=True writes into the reference model, which shares the base's weights "
            "with the model that trains; set sync_ref_model=False."
        )
    if getattr(args, "teacher_model_kind", None) == "ema":
        raise StateError(
            "teacher_model_kind='ema' writes into the teacher, which shares the base's weights "
            "with the model that trains; choose 'base' or 'live'."
        )
    for name, adapter in registry.adapters.items():
        twice = adapted_twice(model, adapter.slots, adapter.trained)
        if twice:
            warnings.warn(
                listing(
                    f"The adapter {name!r} cannot be saved: these modules stand in several places "
                    "of the model, which PEFT's format cannot say",
                    twice,
                    "Exclude them, or keep the result with hf_lora.merge_and_unwrap.",
                ),
                HfLoRAWarning,
                stacklevel=2,
            )
    registry.settle_buffers()
    adopt_unfrozen(model, registry)
    weighed = [
        f"{name}: {factor:g}"
        for name, factor in registry.routing.now().chosen
        if factor != 1.0 and _trainable(registry, name)
    ]
    if weighed:
        headline = "These adapters train at a strength of the moment, which no file keeps"
        advice = "Train with hf_lora.activate(model, name), and choose another alpha if need be."
        warnings.warn(listing(headline, weighed, advice), HfLoRAWarning, stacklevel=2)
    adapters = registry.all_parameters()
    base_trains = any(p.requires_grad for p in model.parameters() if id(p) not in adapters)
    if not base_trains and not any(_trainable(registry, name) for name in registry.routing.active):
        states = [_state(registry, name) for name in registry.adapters]
        raise GradientError(
            listing(
                "Nothing would train",
                states,
                "Use hf_lora.unfreeze(model, name), load with trainable=True, or "
                "hf_lora.activate(model, name).",
            )
        )


def switch_dropout_off(registry: Registry) -> None:
    """Do for adapters what TRL's ``disable_dropout`` does for every ``nn.Dropout`` of the model.

    The adapters' configurations, and what is saved, keep the value.
    """
    for module in registry.modules.values():
        for name, slot in module.lora_slots.items() if isinstance(module, Adaptable) else ():
            module.lora_slots[name] = dataclasses.replace(slot, dropout=0.0)


def check_gradients(model: nn.Module, registry: Registry) -> None:
    """Compare the tensors that should train with those that received a gradient.

    Raises:
        GradientError: None did.

    Warns:
        HfLoRAWarning: Some did not; each is named, with the reason where it is known.
    """
    missing: list[str] = []
    reached = False
    for name in registry.adapters:
        tensors = _own(registry, name)
        without = [key for key, parameter in tensors.items() if parameter.grad is None]
        reached = reached or len(without) < len(tensors)
        if without and name not in registry.routing.active:
            missing.append(f"all {len(without)} of {name!r}: it is not active")
        else:
            missing += _with_reasons(model, without)
    if missing and not reached:
        raise nothing_trains(model, registry)
    if missing:
        warnings.warn(
            listing("These adapter tensors received no gradient at the first step", missing),
            HfLoRAWarning,
            stacklevel=2,
        )


def check_optimizer(model: nn.Module, registry: Registry, optimizer: Any) -> None:
    """Compare the tensors of active adapters that should train with those the optimizer holds.

    Raises:
        GradientError: It holds none of them.

    Warns:
        HfLoRAWarning: It holds only some; the others are named.
    """
    groups = getattr(optimizer, "param_groups", None) or ()
    held = [tensor for group in groups for tensor in group["params"]]
    wanted: dict[str, nn.Parameter] = {}
    for name in registry.routing.active:
        wanted |= _own(registry, name)
    ids = {id(tensor) for tensor in held}
    missing = {key: tensor for key, tensor in wanted.items() if id(tensor) not in ids}
    if not missing or not held or _are_replaced([*held, *wanted.values()]):
        return
    if len(missing) < len(wanted):
        headline = "The optimizer does not hold these adapter tensors, so they stay as they are"
        warnings.warn(listing(headline, missing, _LATER), HfLoRAWarning, stacklevel=2)
        return
    own = sum(id(parameter) in ids for parameter in model.parameters())
    raise GradientError(
        listing(
            "The optimizer holds no tensor of an active adapter, so training would not change "
            f"them; of the {len(ids)} parameters that it holds, {own} are this model's",
            missing,
            _STALE,
        )
    )


def _are_replaced(tensors: list[Any]) -> bool:
    """Say whether a wrapper may have put other tensors in the place of the model's or optimizer's.

    Sharding does, to DTensors and back for each forward; accelerate then finds out itself what is
    not the model's. Optimizers that step copies of their own (in float32, on the CPU) hold plain
    tensors.
    """
    return any(is_distributed(t) or not isinstance(t, nn.Parameter) for t in tensors)


@torch.no_grad()
def check_finite(registry: Registry) -> None:
    """Raise GradientError if training has made numbers of an adapter nan or infinite.

    Called where Trainer logs and saves, and so has waited for the device already.
    """
    trains: dict[str, torch.Tensor] = {}
    for name in registry.adapters:
        trains |= {key: to_local(tensor) for key, tensor in _trainable(registry, name).items()}
    trains = {key: t for key, t in trains.items() if t.numel() and not t.is_meta}
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in trains.values():
        by_device.setdefault(tensor.device, []).append(tensor)
    found = [torch.stack([t.isfinite().all() for t in each]).all() for each in by_device.values()]
    if all(map(bool, found)):
        return
    bad = [key for key, tensor in trains.items() if not bool(tensor.isfinite().all())]
    raise GradientError(
        listing(
            "Training has gone wrong: these adapter tensors are no longer finite",
            bad,
            "They will never be again. What was saved before is as it was: go on from there, with "
            "a lower learning rate, with max_grad_norm, or in a type of more bits.",
        )
    )


def nothing_trains(model: nn.Module, registry: Registry) -> GradientError:
    """Return the error for a run in which no gradient reaches any adapter."""
    keys = [key for name in registry.routing.active for key in _own(registry, name)]
    return GradientError(
        listing(
            "No adapter tensor received a gradient, so training would change nothing",
            _with_reasons(model, keys) or [_state(registry, name) for name in registry.adapters],
            _REASONS,
        )
    )


def _trainable(registry: Registry, name: str) -> dict[str, nn.Parameter]:
    return {key: p for key, p in registry.parameters(name) if p.requires_grad}


def _own(registry: Registry, name: str) -> dict[str, nn.Parameter]:
    """Return what trains of an adapter, without what somebody unfroze beside it."""
    beside = {id(adopted.parameter) for adopted in registry.adopted}
    return {key: p for key, p in _trainable(registry, name).items() if id(p) not in beside}


def _state(registry: Registry, name: str) -> str:
    active = "active" if name in registry.routing.active else "not active"
    return f"{name!r} is {active} and {'trainable' if _trainable(registry, name) else 'frozen'}"


def _with_reasons(model: nn.Module, keys: list[str]) -> list[str]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    paths = [path for path, module in model.named_modules() if head is not None and module is head]
    return [
        f"{key} ({_HEAD})" if any(key.startswith(f"{path}.") for path in paths) else key
        for key in keys
    ]
