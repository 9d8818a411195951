"""The check, in every training with Trainer, that the adapters receive gradients."""

import warnings
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from hf_lora.errors import GradientError, HfLoRAWarning, listing
from hf_lora.model.registry import Registry, find


class GradientCheck(TrainerCallback):
    """Checks once, before the first optimizer step, that the adapters receive gradients."""

    def __init__(self) -> None:
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check again in every training."""
        self.done = False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Raise GradientError if no adapter tensor has a gradient; warn if some have none."""
        if self.done or not isinstance(model, nn.Module):
            return
        self.done = True
        found = find(model)
        if found is not None:
            check_gradients(*found)


def check_gradients(model: nn.Module, registry: Registry) -> None:
    """Compare the tensors that should train with those that received a gradient.

    Raises:
        GradientError: None did.
    """
    expected = {
        key: parameter
        for name in registry.routing.active
        for key, parameter in registry.parameters(name)
        if parameter.requires_grad
    }
    without = [key for key, parameter in expected.items() if parameter.grad is None]
    if expected and len(without) == len(expected):
        raise GradientError(
            listing(
                "No adapter tensor received a gradient, so training would change nothing",
                without,
                "Usual reasons: the loss does not depend on the adapted layers, the forward ran "
                "under torch.no_grad, or reentrant checkpointing without input gradients.",
            )
        )
    if without:
        warnings.warn(
            listing("These adapter tensors received no gradient", _with_reason(model, without)),
            HfLoRAWarning,
            stacklevel=2,
        )


def _with_reason(model: nn.Module, keys: list[str]) -> list[str]:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    paths = [path for path, module in model.named_modules() if head is not None and module is head]
    reason = (
        " (the output head: a fused loss, such as TRL's or Liger's, reads its weight and never "
        "calls the layer; turn the fused loss off or do not target the head)"
    )
    return [
        key + (reason if any(key.startswith(f"{path}.") for path in paths) else "") for key in keys
    ]
