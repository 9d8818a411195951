"""A recipe from beginning to end: data, base, training, adapter, push."""

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import Progress

from hf_lora.adapter_io.collective import is_main_process
from hf_lora.errors import HfLoRAWarning
from hf_lora.hub.card.facts import Training
from hf_lora.hub.push_folder import push_adapter_folder
from hf_lora.planning.tokens import with_row_numbers
from hf_lora.recipes.base_model import load_config, load_model, load_tokenizer
from hf_lora.recipes.data import DataSet, Mix
from hf_lora.recipes.dataset import Examples, load_examples
from hf_lora.recipes.estimate import warn_if_slow
from hf_lora.recipes.file import read_recipe
from hf_lora.recipes.progress import bars, say
from hf_lora.recipes.recipe import Recipe
from hf_lora.recipes.record import Record, Run, Trained
from hf_lora.recipes.sweep import run_sweep
from hf_lora.recipes.tasks import TASKS, labelled
from hf_lora.recipes.trainer_arguments import RATE


def train_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any],
    settings: Iterable[str],
    output: Path | None,
    *,
    resume: bool,
    more: float | None = None,
) -> Trained:
    """Do what :func:`hf_lora.train` promises."""
    recipe = read_recipe(source, settings, output)
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        PartialState(cpu=bool(recipe.trainer.get("use_cpu")))
    record = Record(recipe, resume=resume, more=more)
    if together:
        PartialState().wait_for_everyone()  # none writes before all have looked
    task = TASKS[recipe.task]
    with bars() as progress:
        config = load_config(recipe.base)
        task.check(config)
        tokenizer = load_tokenizer(recipe.base)
        wanted = dataclasses.replace(recipe, lora=with_row_numbers(recipe.lora, tokenizer))
        examples = _examples(recipe, config, tokenizer, progress)
        if recipe.base.dtype == "auto" and isinstance(config.dtype, torch.dtype):
            warn_if_slow(config.dtype, "train sooner with --set base.dtype={}")
        waiting = progress.add_task("loading the weights", total=None)
        options = task.load_options(examples, tokenizer)
        model = load_model(recipe.base, task.loader, options)
        progress.remove_task(waiting)
        best = run_sweep(model, tokenizer, wanted, examples, record, progress)
    if is_main_process():
        # with its chat template, as it was in training, whatever becomes of the base's
        tokenizer.save_pretrained(recipe.output)
    training = _training(recipe, best, examples)
    record.finish(training)
    return Trained(
        adapter=recipe.output,
        best=best,
        runs=tuple(record.runs),
        train_examples=len(examples.train),
        eval_examples=len(examples.eval or []),
        rows=examples.counts,
        pushed=_push(recipe, training),
    )


def _examples(recipe: Recipe, config: Any, tokenizer: Any, progress: Progress) -> Examples:
    task = progress.add_task("reading the data", total=None)
    examples = load_examples(
        recipe.data,
        tokenizer,
        config,
        int(recipe.trainer.get("seed", 42)),
        lambda rows: progress.update(task, completed=rows),
        shapes=TASKS[recipe.task].shapes,
        forms=TASKS[recipe.task].forms,
    )
    if recipe.task == "classification":
        examples = labelled(examples)
    progress.remove_task(task)
    found, held = len(examples.train), len(examples.eval or [])
    say(progress, f"{found} examples to train on, {held} to evaluate")
    _warn_of_losses(examples)
    return examples


def _warn_of_losses(examples: Examples) -> None:
    counts, lines = examples.counts, []
    if counts.cut:
        lines.append(
            f"{counts.cut} of {counts.rows} rows were cut to {examples.max_length} tokens "
            "(data.max_length)"
        )
    if counts.dropped:
        lines.append(
            f"{counts.dropped} of {counts.rows} rows were left out: nothing in them to learn"
        )
    for line in lines:
        warnings.warn(line, HfLoRAWarning, stacklevel=5)


def _push(recipe: Recipe, training: Training) -> str | None:
    if recipe.push is None or not is_main_process():
        return None
    fields = dataclasses.asdict(recipe.push)
    return push_adapter_folder(recipe.output, training=training, **fields).url


def _training(recipe: Recipe, best: Run, examples: Examples) -> Training:
    source = recipe.data.train
    parts = [part.source for part in source.parts] if isinstance(source, Mix) else [source]
    ids = [
        part.dataset
        for part in parts
        if isinstance(part, DataSet) and not Path(part.dataset).is_dir()
    ]
    return Training(
        datasets=ids,
        dataset_words=f"{len(examples.train):,} examples.",
        metrics={
            name: value
            for name in ("eval_loss", "eval_accuracy")
            if (value := getattr(best, name)) is not None
        },
        hyperparameters={**recipe.trainer, RATE: best.learning_rate, "steps": best.steps},
    )
