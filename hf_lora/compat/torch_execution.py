"""How PyTorch is executing what runs now: transforms, tracing, a backward pass. Seen in 2.13."""

from collections.abc import Callable

import torch
from torch.autograd import Variable, forward_ad


def in_transform() -> bool:
    """Say whether functorch, forward-mode differentiation or ``torch.jit.trace`` is at work.

    Without it an operation that computes its own gradient would be taken for a constant by the
    first two, and written into a trace as numbers by the third.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def backward_number() -> int:
    """Return the number of the backward pass that runs in this thread, -1 outside of one.

    Without it a hook that runs for each parameter could not tell the first of a backward pass.
    """
    return torch._C._current_graph_task_id()


def after_backward(function: Callable[[], None]) -> None:
    """Have ``function`` called once, when the backward pass that runs now has ended.

    Without it gradients would be averaged before the last of them is there.
    """
    Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]
