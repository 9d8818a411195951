"""Activation checkpointing: the functions that PyTorch runs again in the backward pass.

Seen on PyTorch 2.13, and on DeepSpeed 0.19, which has two ways of its own. All are changed where
every caller passes, however it came by ``checkpoint``: the autograd function of a reentrant one,
and the class whose instance holds what the other will run.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint as checkpoints

Function = Callable[..., Any]
_MARK = "_hf_lora_keeps"


def keep_functions(keep: Callable[[Function], Function]) -> None:
    """Have what will be run again replaced by ``keep(function)``, from now on, in all models.

    Without it a layer that is run again would use the adapters of the moment, and its gradients
    would be wrong, or another adapter's. ``keep`` is called when the forward begins; only the first
    that is given counts.

    Raises:
        AttributeError: This version of PyTorch does it in another way.
    """
    if hasattr(checkpoints.CheckpointFunction, _MARK):
        return
    _keep_reentrant(checkpoints.CheckpointFunction, keep)
    _keep_other(keep)


def keep_functions_of_deepspeed(module: Any, keep: Callable[[Function], Function]) -> None:
    """Do the same for DeepSpeed's module of that name, ``activation_checkpointing.checkpointing``.

    Raises:
        AttributeError: This version of DeepSpeed does it in another way.
    """
    if hasattr(module.CheckpointFunction, _MARK):
        return
    original = module.non_reentrant_checkpoint

    @functools.wraps(original)
    def non_reentrant_checkpoint(function: Function, *args: Any) -> Any:
        return original(keep(function), *args)

    _keep_reentrant(module.CheckpointFunction, keep)
    module.non_reentrant_checkpoint = non_reentrant_checkpoint


def _keep_reentrant(owner: Any, keep: Callable[[Function], Function]) -> None:
    original = owner.forward

    def forward(ctx: Any, run_function: Function, *args: Any) -> Any:
        return original(ctx, keep(run_function), *args)

    owner.forward = staticmethod(forward)
    setattr(owner, _MARK, True)


def _keep_other(keep: Callable[[Function], Function]) -> None:
    class _Hook(checkpoints._checkpoint_hook):
        def __init__(self, frame: Any) -> None:
            frame.recompute_fn = keep(frame.recompute_fn)
            super().__init__(frame)

    checkpoints._checkpoint_hook = _Hook  # type: ignore[misc]
