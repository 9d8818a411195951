"""Parameter groups for an optimizer: B may learn faster than A (LoRA+)."""

import math
import numbers
import warnings
from typing import Any

from torch import nn

from hf_lora.errors import ConfigError, GradientError, HfLoRAWarning, listing
from hf_lora.layers.roles import Group
from hf_lora.model.registry import Registry, wrapped


def optimizer_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, b_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Return everything that hf_lora trains as parameter groups for an optimizer.

    With ``b_lr_ratio`` above 1 this is LoRA+ (https://arxiv.org/abs/2402.12354): B learns at
    ``lr * b_lr_ratio``, everything else at ``lr``. Ratios from 2 to 16 are usual, with a somewhat
    lower ``lr`` than without. A scheduler that multiplies rates, as Trainer's do, keeps the ratio.

    The groups are, in this order and without those that would be empty: ``"lora_A"``,
    ``"lora_B"``, ``"trained"`` (modules trained in full) and ``"trained_no_decay"`` (their biases,
    norms and other vectors). They hold the trainable tensors of all adapters, active or not, as
    they are now: make them from the very model that trains, and anew after ``unwrap`` and ``wrap``
    or when adapters are added or unfrozen. A Trainer whose optimizer holds nothing of its model's
    active adapters raises GradientError at the first step, and warns if it holds only some; a loop
    of your own says nothing.

    Args:
        model: A wrapped model.
        lr: Learning rate of all but B.
        weight_decay: For A, B and ``"trained"``. AdamW multiplies it by each group's own rate.
        b_lr_ratio: B's learning rate as a multiple of ``lr``.

    Returns:
        A dictionary for each group: ``name``, ``params``, ``lr`` and ``weight_decay``.

    Raises:
        ConfigError: A number is not finite or out of its range; all such are named.
        StateError: The model is not wrapped, is merged, or has lost an adapted layer.
        GradientError: Every adapter is frozen.

    Warns:
        HfLoRAWarning: Parameters of the base require gradients; they are in no group.

    Example:
        >>> model = hf_lora.wrap(nn.Sequential(nn.Linear(4, 4)), targets="0", r=2)
        >>> groups = hf_lora.optimizer_groups(model, lr=1e-4, b_lr_ratio=16)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('lora_A', 0.0001), ('lora_B', 0.0016)]
        >>> optimizer = torch.optim.AdamW(groups, fused=True)
    """
    lr, weight_decay, b_lr = _rates(lr, weight_decay, b_lr_ratio)
    inner, registry = wrapped(model)
    registry.check_unmerged("train")
    registry.check_in_place(inner)
    parameters = _by_group(registry)
    if not parameters:
        raise GradientError(
            listing(
                "Nothing would train",
                [f"{name!r} is frozen" for name in registry.adapters],
                "Use hf_lora.unfreeze(model, name), or load with trainable=True.",
            )
        )
    _tell_left_out(inner, registry)
    return [
        {
            "name": group.name,
            "params": params,
            "lr": b_lr if group.fast else lr,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group, params in sorted(parameters.items())
    ]


def _rates(lr: object, weight_decay: object, ratio: object) -> tuple[float, float, float]:
    """Return (lr, weight decay, B's lr) as floats, or raise ConfigError for all that are wrong."""
    numbers_given = {"lr": lr, "weight_decay": weight_decay, "b_lr_ratio": ratio}
    found = {name: _as_float(value) for name, value in numbers_given.items()}
    problems = []
    for name, number in found.items():
        least = "at least 0" if name == "weight_decay" else "above 0"
        good = math.isfinite(number) and (number > 0 or (number == 0 and name == "weight_decay"))
        if not good:
            problems.append(f"{name}: {numbers_given[name]!r} is not a finite number {least}")
    b_lr = found["lr"] * found["b_lr_ratio"]
    if not problems and not (math.isfinite(b_lr) and b_lr > 0):
        problems.append(f"b_lr_ratio: {ratio!r} times an lr of {lr!r} is {b_lr!r}")
    if problems:
        raise ConfigError(listing("These parameter groups cannot be made", problems))
    return found["lr"], found["weight_decay"], b_lr


def _as_float(value: object) -> float:
    """Return a number as a float, and NaN for whatever is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _by_group(registry: Registry) -> dict[Group, list[nn.Parameter]]:
    groups: dict[Group, list[nn.Parameter]] = {}
    for adapter in registry.adapters:
        tensors = (tensor for *_, tensor in registry.tensors(adapter))
        for (*_, role), tensor in zip(registry.roles(adapter), tensors, strict=True):
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                groups.setdefault(role.group, []).append(tensor)
    return groups


def _tell_left_out(model: nn.Module, registry: Registry) -> None:
    added = registry.all_parameters()
    left_out = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in added
    ]
    if left_out:
        warnings.warn(
            listing(
                "These parameters of the base require gradients and are in no group",
                left_out,
                "Train modules in full with train=[...], or add a group for them yourself.",
            ),
            HfLoRAWarning,
            stacklevel=3,
        )
