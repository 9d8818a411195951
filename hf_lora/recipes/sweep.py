"""Training at one learning rate after the other, each from the same start; the best is kept."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import PrinterCallback, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_lora.adapter_io.collective import is_main_process
from hf_lora.adapter_io.save import save
from hf_lora.api import load, unwrap, wrap
from hf_lora.errors import GradientError
from hf_lora.recipes.callback import TrainingBars
from hf_lora.recipes.dataset import Examples
from hf_lora.recipes.going_on import StopsCleanly, extend
from hf_lora.recipes.history import History, write_history
from hf_lora.recipes.recipe import Recipe
from hf_lora.recipes.record import CHECKPOINTS, Record, Run
from hf_lora.recipes.tasks import TASKS
from hf_lora.recipes.trainer_arguments import arguments, learning_rates

ACCURACIES = ("eval_accuracy", "eval_rewards/accuracies", "eval_mean_token_accuracy")
"""What trainers call the share of rows, or of pairs, that are right."""


def run_sweep(
    model: Any, tokenizer: Any, recipe: Recipe, examples: Examples, record: Record, bars: Progress
) -> Run:
    """Train at each learning rate that is not done yet; the best adapter so far is in the output.

    Every run starts from the same base and the same adapter and sees the same batches. If the
    record says that a finished training is to go on, the best of its runs does.

    Returns:
        The best run; the one run if there is only one.

    Raises:
        GradientError: The one training, or each of several, diverged.
        TrainingStopped: Somebody pressed Ctrl-C.
    """
    rates = learning_rates(recipe)
    best: Run | None = None
    for done in record.runs:
        best = done if done.beats(best) else best
    record.write()
    extended = None if record.extension is None else best
    for rate in rates:
        begun = any(done.learning_rate == rate for done in record.runs)
        if begun and (extended is None or extended.learning_rate != rate):
            continue
        folder = recipe.output / CHECKPOINTS
        if len(rates) > 1:
            folder = folder / f"lr-{rate:g}"
        with _wrapped(model, recipe):
            done, history = _train(model, tokenizer, recipe, rate, folder, examples, record, bars)
            if extended is not None or done.beats(best):
                best = done
                if not done.diverged:
                    save(model, recipe.output)
                    if is_main_process():
                        write_history(recipe.output, history)
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
    """Wrap with a fresh adapter, or the one to go on with, the same each time; leave the base."""
    before = dict(vars(model))
    set_seed(int(recipe.trainer.get("seed", 42)))
    if recipe.continue_from is None:
        wrap(model, config=recipe.lora)
    else:
        load(model, recipe.continue_from, trainable=True)
    try:
        yield
    finally:
        unwrap(model)
        # accelerate leaves its mixed precision and a mark on the instance, and by that mark would
        # treat the next run differently from the first
        for name in vars(model).keys() - before.keys():
            del vars(model)[name]
        vars(model).update(before)


def _train(
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    rate: float,
    folder: Path,
    examples: Examples,
    record: Record,
    bars: Progress,
) -> tuple[Run, History]:
    start = time.monotonic()
    task = TASKS[recipe.task]
    trainer = task.trainer(model, arguments(recipe, rate, folder), examples, tokenizer)
    # it prints to stdout, which belongs to the result
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingBars(bars, f"learning rate {rate:g}"))
    stops = StopsCleanly(bars)
    trainer.add_callback(stops)
    if record.extension is not None:
        extend(trainer, record.extension.epochs, record.extension.start)
    begun = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    train_loss, diverged = math.nan, False
    measured: dict[str, float] = {}
    try:
        with stops.listening():
            train_loss = trainer.train(resume_from_checkpoint=begun).training_loss
        stops.check(trainer)
        measured = _measured(trainer) if examples.eval else {}
    except GradientError:
        diverged = not _is_finite(model)
        if not diverged or len(learning_rates(recipe)) == 1:
            raise
    loss = measured.get("eval_loss", math.nan)
    done = Run(
        learning_rate=rate,
        steps=trainer.state.global_step,
        train_loss=train_loss,
        eval_loss=loss if math.isfinite(loss) else None,
        seconds=round(time.monotonic() - start, 2),
        diverged=diverged,
        eval_accuracy=next((measured[name] for name in ACCURACIES if name in measured), None),
    )
    return done, trainer.state.log_history


def _is_finite(model: Any) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def _measured(trainer: Trainer) -> dict[str, float]:
    """Evaluate the model as it is now, unless Trainer did so after the last step."""
    if not trainer.args.load_best_model_at_end:
        for entry in reversed(trainer.state.log_history):
            if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
                return entry
    return trainer.evaluate()
