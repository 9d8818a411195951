"""What TRL's trainers compare with: the policy as the trainer received it.

TRL loads it anew from the place that the model's configuration names. That is a second model in
memory, and another one where the base was changed in memory (merged, resized) or where the adapter
had been trained before. For a wrapped model it is made of the model's own tensors.
"""

import contextvars
import warnings
from typing import Any

from torch import nn

from hf_lora.adapter_io.owner import check_saves_as_one, owner
from hf_lora.adapter_io.save import base_name
from hf_lora.compat.dtensor import has_distributed_parameters
from hf_lora.errors import HfLoRAWarning, StateError
from hf_lora.integrations.base_view import is_fresh, policy_view
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.in_front import Original, missing_parts, put_in_front, warn_of_missing

_TRAINERS = {
    "trl.trainer.dpo_trainer": "DPOTrainer",
    "trl.trainer.kto_trainer": "KTOTrainer",
    "trl.trainer.grpo_trainer": "GRPOTrainer",
    "trl.trainer.rloo_trainer": "RLOOTrainer",
    "trl.experimental.sdft.sdft_trainer": "SDFTTrainer",
    "trl.experimental.sdpo.sdpo_trainer": "SDPOTrainer",
}
"""Those that load it by name, in their constructors and with this function of their module's:"""
_LOAD = "create_model_from_path"

_COPYING = (
    "trl.experimental.utils",
    "trl.experimental.a2po.a2po_trainer",
    "trl.experimental.online_dpo.online_dpo_trainer",
)
"""Modules in which a reference is a deep copy, base and all, made by this function:"""
_COPY = "create_reference_model"

_made: contextvars.ContextVar[Any] = contextvars.ContextVar("trainer being made", default=None)


def install() -> None:
    """Give TRL's trainers their reference, now where they are imported, else when they will be."""
    for name in _TRAINERS:
        when_imported(name, _patch_trainer)
    for name in _COPYING:
        when_imported(name, _patch_copying)


def _patch_trainer(module: Any) -> None:
    cls = getattr(module, _TRAINERS[module.__name__], None)
    missing = [
        *(f"{_TRAINERS[module.__name__]}.{name}" for name in missing_parts(cls, ("__init__",))),
        *missing_parts(module, (_LOAD,)),
    ]
    if missing:
        warn_of_missing(
            module.__name__,
            missing,
            "its reference model is the checkpoint on disk; pass ref_model",
        )
        return
    put_in_front(cls, "__init__", _make)
    put_in_front(module, _LOAD, _load)


def _patch_copying(module: Any) -> None:
    if missing_parts(module, (_COPY,)):
        warn_of_missing(module.__name__, [_COPY], "a reference model is a second copy of the base")
    else:
        put_in_front(module, _COPY, _copy)


def _make(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Make a trainer; what it loads meanwhile under its policy's name is its reference."""
    before = _made.set(trainer)
    try:
        original(*args, **kwargs)
    finally:
        _made.reset(before)
    if getattr(trainer.args, "cast_lm_head_to_fp32", False) and trainer.ref_model is not None:
        _keep_type_of_embeddings(trainer.model, trainer.accelerator.unwrap_model(trainer.ref_model))


def _load(original: Original, model_id: str, *args: Any, **kwargs: Any) -> Any:
    trainer = _made.get()
    policy = getattr(trainer, "model", None)  # not before the policy itself was loaded
    if not isinstance(policy, nn.Module):
        return original(model_id, *args, **kwargs)
    check_saves_as_one(policy)
    found = owner(policy)
    if found is None or model_id != (base_name(found[0]) or ""):
        return original(model_id, *args, **kwargs)
    inner, registry = found
    if not has_distributed_parameters(inner):
        return policy_view(policy, share=not _is_to_be_sharded(trainer))
    if not is_fresh(registry):
        raise StateError(
            "The reference of this trainer would be the adapter as it is now, and a model that is "
            "spread over several processes cannot be copied. Train from a fresh adapter on a base "
            "into which this one was merged, or let the trainer itself spread the model."
        )
    warnings.warn(
        f"The model is spread over several processes, so its reference is loaded from {model_id} "
        "once more: it is another one if the base was changed since it was loaded from there.",
        HfLoRAWarning,
        stacklevel=2,
    )
    return original(model_id, *args, **kwargs)


def _keep_type_of_embeddings(policy: nn.Module, reference: nn.Module) -> None:
    """Have a reference's embeddings answer in the type that its layers have.

    GRPO has cast the policy's head in place, tied embeddings with it, and has those answer in the
    type that they had; the reference's, which are the same tensor, had another by then.
    """
    embeddings = reference.get_input_embeddings()  # type: ignore[operator]
    if embeddings.weight is policy.get_input_embeddings().weight:  # type: ignore[operator]
        rest = (p.dtype for p in reference.parameters() if p is not embeddings.weight)
        dtype = next(each for each in rest if each.is_floating_point)
        embeddings.register_forward_hook(lambda module, args, output: output.to(dtype))


def _copy(original: Original, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    shares_layers = bool(args or {name: v for name, v in kwargs.items() if v is not None})
    if owner(model) is None or shares_layers:
        return original(model, *args, **kwargs)
    return policy_view(model)


def _is_to_be_sharded(trainer: Any) -> bool:
    """Say whether TRL is going to cut the reference into parts, apart from the policy."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.is_fsdp_enabled or getattr(plugin, "zero_stage", 0) == 3
