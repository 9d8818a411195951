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

from hf_lora.adapter_io.save import save
from hf_lora.api import unwrap, wrap
from hf_lora.errors import GradientError
from hf_lora.recipes.callback import TrainingBars
from hf_lora.recipes.dataset import Examples, collate
from hf_lora.recipes.history import History, write_history
from hf_lora.recipes.recipe import Recipe
from hf_lora.recipes.record import CHECKPOINTS, Record, Run
from hf_lora.recipes.trainer_arguments import arguments, learning_rates


def run_sweep(
    model: Any, recipe: Recipe, examples: Examples, record: Record, bars: Progress
) -> Run:
    """Train at each learning rate that is not done yet; the best adapter so far is in the output.

    Every run starts from the same base and the same fresh adapter and sees the same batches.

    Returns:
        The best run; the one run if there is only one.

    Raises:
        GradientError: The one training, or each of several, diverged.
    """
    rates = learning_rates(recipe.trainer)
    best: Run | None = None
    for done in record.runs:
        best = done if done.beats(best) else best
    record.write()
    for rate in rates:
        if any(done.learning_rate == rate for done in record.runs):
            continue
        folder = recipe.output / CHECKPOINTS
        if len(rates) > 1:
            folder = folder / f"lr-{rate:g}"
        with _wrapped(model, recipe):
            done, history = _train(model, recipe, rate, folder, examples, bars)
            if done.beats(best):
                best = done
                if not done.diverged:
                    save(model, recipe.output)
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
    """Wrap with a fresh adapter, the same each time; leave the base as it was."""
    before = dict(vars(model))
    set_seed(int(recipe.trainer.get("seed", 42)))
    wrap(model, config=recipe.lora)
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
    model: Any, recipe: Recipe, rate: float, folder: Path, examples: Examples, bars: Progress
) -> tuple[Run, History]:
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
    trainer.add_callback(TrainingBars(bars, f"learning rate {rate:g}"))
    begun = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    train_loss, loss, diverged = math.nan, math.nan, False
    try:
        train_loss = trainer.train(resume_from_checkpoint=begun).training_loss
        loss = _eval_loss(trainer) if examples.eval else math.nan
    except GradientError:
        diverged = not _is_finite(model)
        if not diverged or len(learning_rates(recipe.trainer)) == 1:
            raise
    done = Run(
        learning_rate=rate,
        steps=trainer.state.global_step,
        train_loss=train_loss,
        eval_loss=loss if math.isfinite(loss) else None,
        seconds=round(time.monotonic() - start, 2),
        diverged=diverged,
    )
    return done, trainer.state.log_history


def _is_finite(model: Any) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def _eval_loss(trainer: Trainer) -> float:
    """Evaluate the model as it is now, unless Trainer did so after the last step."""
    if not trainer.args.load_best_model_at_end:
        for entry in reversed(trainer.state.log_history):
            if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
                return entry["eval_loss"]
    return trainer.evaluate()["eval_loss"]
