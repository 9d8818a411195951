"""Training at one learning rate after the other, each from the same start; the best is kept."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_lora
from hf_lora.errors import GradientError
from hf_lora.recipes.dataset import Examples, collate
from hf_lora.recipes.recipe import Recipe
from hf_lora.recipes.record import CHECKPOINTS, Record, Try
from hf_lora.recipes.trainer_arguments import arguments, learning_rates

_LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")


def run_sweep(
    model: Any, recipe: Recipe, examples: Examples, record: Record, bars: Progress
) -> Try:
    """Train at each learning rate that is not done yet; the best adapter so far is in the output.

    Every try starts from the same base and the same fresh adapter and sees the same batches.

    Returns:
        The best try; the one try if there is only one.

    Raises:
        GradientError: The one training, or each of several, diverged.
    """
    rates = learning_rates(recipe.trainer)
    best: Try | None = None
    for done in record.tries:
        best = done if done.beats(best) else best
    record.write()
    for rate in rates:
        if any(done.learning_rate == rate for done in record.tries):
            continue
        folder = recipe.output / CHECKPOINTS
        if len(rates) > 1:
            folder = folder / f"lr-{rate:g}"
        with _wrapped(model, recipe):
            done = _train(model, recipe, rate, folder, examples, bars)
            if done.beats(best):
                best = done
                if not done.diverged:
                    hf_lora.save(model, recipe.output)
            record.add(done)
    assert best is not None
    if best.diverged:
        raise GradientError(
            f"Each of these learning rates made the adapter's numbers infinite or nan: {rates}. "
            "Nothing was saved; use lower ones, or max_grad_norm."
        )
    return best


@contextlib.contextmanager
def _wrapped(model: Any, recipe: Recipe) -> Iterator[None]:
    """Wrap with a fresh adapter, the same each time; leave the base as it was."""
    before = dict(vars(model))
    set_seed(int(recipe.trainer.get("seed", 42)))
    hf_lora.wrap(model, config=recipe.lora)
    try:
        yield
    finally:
        hf_lora.unwrap(model)
        # accelerate leaves its mixed precision and a mark on the instance, and by that mark would
        # treat the next try differently from the first
        for name in vars(model).keys() - before.keys():
            del vars(model)[name]
        vars(model).update(before)


def _train(
    model: Any, recipe: Recipe, rate: float, folder: Path, examples: Examples, bars: Progress
) -> Try:
    start = time.monotonic()
    trainer = Trainer(
        model=model,
        args=arguments(recipe.trainer, rate, folder),
        train_dataset=examples.train,  # type: ignore[arg-type]
        eval_dataset=examples.eval,  # type: ignore[arg-type]
        data_collator=collate,
    )
    # it prints to stdout, which belongs to the result
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Bars(bars, f"learning rate {rate:g}"))
    begun = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    train_loss, loss, diverged = math.nan, math.nan, False
    try:
        train_loss = trainer.train(resume_from_checkpoint=begun).training_loss
        loss = _eval_loss(trainer) if examples.eval else math.nan
    except GradientError:
        diverged = not _is_finite(model)
        if not diverged or len(learning_rates(recipe.trainer)) == 1:
            raise
    return Try(
        learning_rate=rate,
        steps=trainer.state.global_step,
        train_loss=train_loss,
        eval_loss=loss if math.isfinite(loss) else None,
        seconds=round(time.monotonic() - start, 2),
        diverged=diverged,
    )


def _is_finite(model: Any) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def _eval_loss(trainer: Trainer) -> float:
    """Evaluate the model as it is now, unless Trainer did so after the last step."""
    if not trainer.args.load_best_model_at_end:
        for entry in reversed(trainer.state.log_history):
            if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
                return entry["eval_loss"]
    return trainer.evaluate()["eval_loss"]


class _Bars(TrainerCallback):
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
