"""Activation checkpointing: the functions that PyTorch runs again in the backward pass.

Seen on PyTorch 2.13. Both ways are changed where every caller passes, however it came by
``checkpoint``: the autograd function of the reentrant one, and the class whose instance holds what
the other will run.
"""

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
    _keep_reentrant(keep)
    _keep_other(keep)
    setattr(checkpoints.CheckpointFunction, _MARK, True)


def _keep_reentrant(keep: Callable[[Function], Function]) -> None:
    original = checkpoints.CheckpointFunction.forward

    def forward(ctx: Any, run_function: Function, preserve_rng_state: bool, *args: Any) -> Any:
        return original(ctx, keep(run_function), preserve_rng_state, *args)

    checkpoints.CheckpointFunction.forward = staticmethod(forward)  # type: ignore[method-assign]


def _keep_other(keep: Callable[[Function], Function]) -> None:
    class _Hook(checkpoints._checkpoint_hook):
        def __init__(self, frame: Any) -> None:
            frame.recompute_fn = keep(frame.recompute_fn)
            super().__init__(frame)

    checkpoints._checkpoint_hook = _Hook  # type: ignore[misc]
