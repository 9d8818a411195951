"""Checkpoints of a Trainer under accelerate's FSDP or DeepSpeed: files that one process writes.

There Trainer has the whole base gathered or written, and for sharded state dicts nothing that is an
adapter. What trains is small: adapters and optimizer are gathered, and written as they always are,
so that a checkpoint can be resumed on any number of processes, sharded or not.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_lora.adapter_io.owner import owner
from hf_lora.compat.libraries import is_pretrained
from hf_lora.integrations.in_front import Original
from hf_lora.integrations.trainer.checks import check_finite
from hf_lora.integrations.trainer.deepspeed import check_loaded
from hf_lora.integrations.trainer.optimizer_state import gathered, whole_states
from hf_lora.model.registry import find, registry_of


def save_model(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Save adapters, gathered by all processes, whatever type of state dict FSDP is set to.

    Raises:
        GradientError: They are no longer numbers. No folder is made, which a resume would choose.
    """
    found = owner(trainer.model) if isinstance(trainer.model, nn.Module) else None
    if found is not None:
        check_finite(found[1])
    model = _under_fsdp(trainer) or _under_deepspeed(trainer)
    if model is None:
        original(*args, **kwargs)
        return
    registry = registry_of(model)
    registry.all_save = True
    # as for a model that from_pretrained has sharded: every process comes to save_pretrained
    attributes = dict.fromkeys(("is_fsdp_enabled", "is_deepspeed_enabled"), False)
    try:
        with _with(trainer, model=model, is_distributed_loading_by_transformers=True, **attributes):
            original(*args, **kwargs)
    finally:
        registry.all_save = False


def save_optimizer_and_scheduler(original: Original, trainer: Any, output_dir: str) -> None:
    """Save the optimizer's state, gathered by all processes, as without FSDP."""
    if _under_fsdp(trainer) is None:
        original(output_dir)
        return
    whole = _Gathered(gathered(trainer.optimizer.state_dict()))
    with _with(trainer, optimizer=whole, is_fsdp_enabled=False):
        original(output_dir)


def load_optimizer_and_scheduler(original: Original, trainer: Any, checkpoint: str | None) -> None:
    """Load what :func:`save_optimizer_and_scheduler`, or a run without FSDP, has saved."""
    if _under_fsdp(trainer) is None:
        original(checkpoint)
        model = _under_deepspeed(trainer)
        if model is not None and checkpoint is not None:
            check_loaded(model, checkpoint)
        return
    with whole_states(trainer.optimizer), _with(trainer, is_fsdp_enabled=False):
        original(checkpoint)


def _under_fsdp(trainer: Any) -> nn.Module | None:
    """Return our model if it is a transformers model that accelerate shards; never FSDP1's."""
    return _our_model(trainer) if getattr(trainer, "is_fsdp_enabled", False) else None


def _under_deepspeed(trainer: Any) -> nn.Module | None:
    """Return our model if it is a transformers model that DeepSpeed trains."""
    return _our_model(trainer) if getattr(trainer, "is_deepspeed_enabled", False) else None


def _our_model(trainer: Any) -> nn.Module | None:
    found = find(trainer.model) if isinstance(trainer.model, nn.Module) else None
    return found[0] if found is not None and is_pretrained(found[0]) else None


@contextlib.contextmanager
def _with(trainer: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(trainer, name) for name in attributes}
    vars(trainer).update(attributes)
    try:
        yield
    finally:
        vars(trainer).update(before)


@dataclasses.dataclass
class _Gathered:
    """An optimizer whose state one process can ask for alone, because it is there."""

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state
