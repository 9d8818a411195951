"""What must hold before a plan is executed on a model, and what is told of one that is sound."""

import warnings

from torch import nn

from hf_lora.compat.accelerate import is_on_meta, offloads_below
from hf_lora.compat.deepspeed import have_engine
from hf_lora.errors import HfLoRAWarning, StateError, TargetError, listing
from hf_lora.kinds.table import kind_of
from hf_lora.layers.probe import host_class, is_packed
from hf_lora.layers.trained import parts_with_tensors
from hf_lora.planning.records import Plan
from hf_lora.planning.ties import followers
from hf_lora.planning.tree import SWITCHED_OFF
from hf_lora.targets import inside


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise one error for everything that forbids executing ``plan`` on ``model``."""
    if plan.problems:
        raise TargetError(
            listing(
                f"This {plan.model} cannot be wrapped so",
                plan.problems,
                "See print(hf_lora.plan(model, ...)) and model.named_modules().",
            )
        )
    tops = [item.path for item in plan.trained]
    follow = followers(plan.ties, tops)
    copied = [*tops, *follow, *plan.copied_biases, *plan.all_rows]
    check_present(model, [target.path for target in plan.targets], copied)


def check_present(model: nn.Module, paths: list[str], trained: list[str]) -> None:
    """Raise StateError if modules cannot be adapted where accelerate, or nobody, has their data.

    Args:
        model: The model.
        paths: Layers that are to get factors. They may be on the meta device, to be loaded later.
        trained: Modules that are to be trained in full, or in some rows: copies of what they have.
    """
    modules = dict(model.named_modules())
    whole = {path for path, module in modules.items() if offloads_below(module)}
    tops = [path for top in trained for path, _ in parts_with_tensors(modules[top], top)]
    below = [*paths, *tops]
    fetched = [path for path in below if inside(path, whole) or ("" in whole)]
    if fetched:
        raise StateError(
            f"{len(fetched)} targeted modules are offloaded by accelerate together with a module "
            f"above them (first: {fetched[0]}), which leaves no room for an adapter; dispatch the "
            "model without preload_module_classes."
        )
    meta = [path for path in tops if is_on_meta(modules[path])]
    if meta:
        raise StateError(
            f"{len(meta)} modules to train are on the meta device (first: {meta[0]}), so "
            "that there is nothing to begin from; load the weights first, then wrap."
        )


def check_gradients(model: nn.Module, plan: Plan) -> list[str]:
    """Raise TargetError if a targeted layer's backward gives its input no gradient.

    Layers with an ordinary weight are known to; of the others one of each kind is tried.

    Returns:
        The same of layers that are no targets: they may lie above those that are, or not.
    """
    faults: dict[tuple, str | None] = {}
    targeted = {target.path for target in plan.targets}
    problems, told = [], []
    for path, module in model.named_modules():
        asked = path in targeted
        kind = kind_of(module) if asked or is_packed(module) else None
        key = kind and kind.lora_probe_key(module)
        if kind is None or key is None:
            continue
        same = (asked, kind, *key)
        if same not in faults:
            faults[same] = kind.lora_gradient_fault(module, certain=not asked)
        if faults[same]:
            line = f"{path or 'the model itself'} ({host_class(module).__name__}): {faults[same]}"
            (problems if asked else told).append(line)
    if problems:
        raise TargetError(listing("These layers cannot be trained through", problems))
    return told


def warn_of_plan(plan: Plan, untrainable: list[str], stacklevel: int) -> None:
    """Warn of what is not wrong, but may make a training useless."""
    unfilled = [f"{p}: {why}" for p, why in plan.unfilled.items() if why != SWITCHED_OFF]
    for headline, lines, advice in (
        ("Updates of these layers may not be seen", plan.warnings, ""),
        ("These parts of the model get no update", plan.missed, ""),
        ("Nothing below these layers, which are no targets, would train", untrainable, ""),
        (
            "The base's checkpoint does not hold these, and they neither train nor are saved with "
            "the adapter",
            unfilled,
            "Where the outputs need them, name their modules in train=[...]; train=() says that "
            "they are as they should be.",
        ),
    ):
        if lines:
            warnings.warn(listing(headline, lines, advice), HfLoRAWarning, stacklevel + 1)


def check_no_engine(model: nn.Module) -> None:
    """Raise StateError if an optimizer of DeepSpeed's has been made: new adapters are not in it."""
    if have_engine(model.parameters()):
        raise StateError(
            "DeepSpeed has been set up with this model, and would never train an adapter that is "
            "added now. Add it before deepspeed.initialize, accelerator.prepare or train()."
        )
