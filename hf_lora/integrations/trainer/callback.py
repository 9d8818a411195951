"""The callback that has every training with Trainer checked: gradients, optimizer, numbers."""

from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_lora.adapter_io.owner import owner
from hf_lora.integrations.trainer.checks import check_finite, check_gradients, check_optimizer


class GradientCheck(TrainerCallback):
    """Checks before the first optimizer step of a run that it will change the adapters."""

    def __init__(self) -> None:
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check again in every training."""
        self.done = False

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raise GradientError if no adapter tensor can change; warn if some cannot."""
        if self.done or not isinstance(model, nn.Module):
            return
        self.done = True
        found = owner(model)
        if found is None or _steps_in_backward(optimizer):
            return
        check_gradients(*found)
        check_optimizer(*found, optimizer)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raise GradientError if the adapters are nan; of losses Trainer leaves nan out."""
        found = owner(model) if isinstance(model, nn.Module) else None
        if found is not None:
            check_finite(found[1])


def _steps_in_backward(optimizer: Any) -> bool:
    """Say whether the step is done, and each gradient dropped, as soon as backward has it.

    So do transformers' layer-wise optimizers and LOMO, which accelerate knows by its class.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    return isinstance(inner, LayerWiseDummyOptimizer) or hasattr(inner, "fused_backward")
