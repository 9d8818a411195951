"""The callback that has the gradients of every training with Trainer checked, once."""

from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from hf_lora.hf.training_checks import check_gradients
from hf_lora.model.registry import find


class GradientCheck(TrainerCallback):
    """Checks before the first optimizer step of a run that the adapters receive gradients."""

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
