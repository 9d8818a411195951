"""``hf-lora train``: an adapter from a recipe."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lora.cli.output import Result, bars, plain, tell
from hf_lora.files.data import WEIGHTS_FILE
from hf_lora.hub.card.facts import Training
from hf_lora.hub.push_folder import Pushed, push_adapter_folder
from hf_lora.planning.records import size
from hf_lora.recipes.base_model import check_writes_text, load_config, load_model, load_tokenizer
from hf_lora.recipes.dataset import Examples, load_examples
from hf_lora.recipes.file import read_recipe
from hf_lora.recipes.recipe import DataSet, Recipe
from hf_lora.recipes.record import CHECKPOINTS, RECORD_FILE, Record, Try
from hf_lora.recipes.sweep import run_sweep
from hf_lora.recipes.trainer_arguments import RATE


def run(path: Path, *, settings: Sequence[str], output: Path | None, resume: bool) -> Result:
    """Train what a recipe says, and push it if the recipe says so.

    The recipe and the data are checked in full before the weights are loaded.

    Raises:
        HfLoRAError: The recipe, the data or the base cannot be used, or training cannot work.
    """
    recipe = read_recipe(path, settings, output)
    record = Record(recipe, resume=resume)
    with bars() as progress:
        examples = _examples(recipe, progress)
        tell(_about(examples))
        model = load_model(recipe.base)
        best = run_sweep(model, recipe, examples, record, progress)
    training = _training(recipe, best, examples)
    record.finish(training)
    pushed = _push(recipe, training) if recipe.push else None
    return Result(
        data={
            "adapter": recipe.output,
            "best": plain(best),
            "tries": plain(record.tries),
            "examples": {
                "train": len(examples.train),
                "eval": len(examples.eval or []),
                **plain(examples.counts),
            },
            "bytes": (recipe.output / WEIGHTS_FILE).stat().st_size,
            "pushed": pushed and pushed.url,
        },
        text=_text(recipe, record.tries, best, pushed),
    )


def _examples(recipe: Recipe, progress: Any) -> Examples:
    task = progress.add_task("reading the data", total=None)
    config = load_config(recipe.base)
    check_writes_text(config)
    tokenizer = load_tokenizer(recipe.base)
    examples = load_examples(
        recipe.data,
        tokenizer,
        config,
        int(recipe.trainer.get("seed", 42)),
        lambda rows: progress.update(task, completed=rows),
    )
    progress.remove_task(task)
    return examples


def _about(examples: Examples) -> str:
    lines = [f"{len(examples.train)} examples to train on, {len(examples.eval or [])} to evaluate"]
    if examples.counts.cut:
        lines.append(
            f"warning: {examples.counts.cut} of {examples.counts.rows} rows were cut to "
            f"{examples.max_length} tokens (data.max_length)"
        )
    if examples.counts.dropped:
        lines.append(
            f"warning: {examples.counts.dropped} of {examples.counts.rows} rows were left out: "
            "nothing in them to learn"
        )
    return "\n".join(lines)


def _push(recipe: Recipe, training: Training) -> Pushed:
    assert recipe.push is not None
    fields = dataclasses.asdict(recipe.push)
    return push_adapter_folder(recipe.output, training=training, **fields)


def _training(recipe: Recipe, best: Try, examples: Examples) -> Training:
    source = recipe.data.train
    ids = (
        [source.dataset]
        if isinstance(source, DataSet) and not Path(source.dataset).is_dir()
        else ()
    )
    return Training(
        datasets=ids,
        dataset_words=f"{len(examples.train):,} examples.",
        metrics={} if best.eval_loss is None else {"eval_loss": best.eval_loss},
        hyperparameters={**recipe.trainer, RATE: best.learning_rate, "steps": best.steps},
    )


def _text(recipe: Recipe, tries: Sequence[Try], best: Try, pushed: Pushed | None) -> str:
    rows = [("learning rate", "steps", "train loss", "eval loss", "seconds", "")]
    for each in tries:
        loss = "-" if each.eval_loss is None else f"{each.eval_loss:.4f}"
        kept = "kept" if each == best and len(tries) > 1 else ""
        rows.append(
            (
                f"{each.learning_rate:g}",
                str(each.steps),
                f"{each.train_loss:.4f}",
                loss,
                f"{each.seconds:.1f}",
                kept,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    weight = size((recipe.output / WEIGHTS_FILE).stat().st_size)
    lines.append(f"adapter: {recipe.output} ({weight}; {CHECKPOINTS}/ and {RECORD_FILE} beside it)")
    if pushed is not None:
        lines.append(f"pushed: {pushed.url}")
    return "\n".join(line.rstrip() for line in lines)
