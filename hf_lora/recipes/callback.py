"""How far a training is, as Trainer tells it: bars, and a line for each thing that it logs."""

from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback

_LOGGED = ("loss", "eval_loss", "eval_accuracy", "learning_rate", "grad_norm", "epoch")


class TrainingBars(TrainerCallback):
    """Shows how far training and evaluation are, and what is logged on the way."""

    def __init__(self, bars: Progress, words: str):
        self._bars = bars
        self._words = words
        self._training: Any = None
        self._evaluation: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin at the step that training begins at."""
        self._training = self._bars.add_task(
            self._words, total=state.max_steps, completed=state.global_step
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show one step more."""
        self._bars.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Show one batch more."""
        if self._evaluation is None:
            total = None if eval_dataloader is None else len(eval_dataloader)
            self._evaluation = self._bars.add_task("evaluation", total=total)
        self._bars.advance(self._evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the evaluation's bar away."""
        if self._evaluation is not None:
            self._bars.remove_task(self._evaluation)
            self._evaluation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print what Trainer logs, as one line on stderr."""
        found = logs or {}
        if "loss" not in found and "eval_loss" not in found:
            return
        shown = [f"{name} {found[name]:.4g}" for name in _LOGGED if name in found]
        self._bars.console.print(
            f"step {state.global_step}: {', '.join(shown)}", markup=False, highlight=False
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take training's bar away."""
        self._bars.remove_task(self._training)
