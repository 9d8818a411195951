"""Checkpoints of a Trainer that runs under accelerate's FSDP: the files that one process writes.

There Trainer has accelerate write the whole base, and for sharded state dicts nothing that is an
adapter. What trains is small: adapters and optimizer are gathered, and written as they always are,
so that a checkpoint can be resumed on any number of processes, sharded or not.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hf_lora.hf.pretrained import is_pretrained
from hf_lora.model.registry import find
from hf_lora.sharding import is_sharded, like, whole

Original = Callable[..., Any]
"""The method of Trainer, bound to the trainer."""


def save_model(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Save adapters, gathered by all processes, whatever type of state dict FSDP is set to."""
    model = _under_fsdp(trainer)
    if model is None:
        original(*args, **kwargs)
        return
    # as for a model that from_pretrained has sharded: every process comes to save_pretrained
    with _with(
        trainer, model=model, is_fsdp_enabled=False, is_distributed_loading_by_transformers=True
    ):
        original(*args, **kwargs)


def save_optimizer_and_scheduler(original: Original, trainer: Any, output_dir: str) -> None:
    """Save the optimizer's state, gathered by all processes, as without FSDP."""
    if _under_fsdp(trainer) is None:
        original(output_dir)
        return
    gathered = _Gathered(trainer.optimizer.state_dict())
    with _with(trainer, optimizer=gathered, is_fsdp_enabled=False):
        original(output_dir)


def load_optimizer_and_scheduler(original: Original, trainer: Any, checkpoint: str | None) -> None:
    """Load what :func:`save_optimizer_and_scheduler`, or a run without FSDP, has saved."""
    if _under_fsdp(trainer) is None:
        original(checkpoint)
        return
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    hook = optimizer.register_load_state_dict_pre_hook(_spread)
    try:
        with _with(trainer, is_fsdp_enabled=False):
            original(checkpoint)
    finally:
        hook.remove()


def _under_fsdp(trainer: Any) -> nn.Module | None:
    """Return our model if it is a transformers model that accelerate shards; never FSDP1's."""
    if not getattr(trainer, "is_fsdp_enabled", False) or not isinstance(trainer.model, nn.Module):
        return None
    found = find(trainer.model)
    return found[0] if found is not None and is_pretrained(found[0]) else None


@contextlib.contextmanager
def _with(trainer: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(trainer, name) for name in attributes}
    vars(trainer).update(attributes)
    try:
        yield
    finally:
        vars(trainer).update(before)


class _Gathered:
    """What an optimizer's state is, whole, for whoever asks it in one process alone."""

    def __init__(self, state: dict[str, Any]):
        self._state = {
            **state,
            "state": {
                index: {key: _whole(value) for key, value in entry.items()}
                for index, entry in state["state"].items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return self._state


def _whole(value: Any) -> Any:
    return whole(value) if isinstance(value, torch.Tensor) else value


def _spread(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Spread a state of whole tensors in the way that the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {key: _as(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _as(value: Any, parameter: torch.Tensor) -> Any:
    same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return like(value, parameter) if same and not is_sharded(value) else value
