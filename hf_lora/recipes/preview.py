"""A training before it is one: rows as the model will see them, counts, memory, time."""

import dataclasses
import math
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lora.api import plan
from hf_lora.errors import TargetError, listing
from hf_lora.planning.records import Plan
from hf_lora.planning.tokens import with_row_numbers
from hf_lora.recipes.base_model import load_config, load_tokenizer, skeleton
from hf_lora.recipes.dataset import Counts, Example, load_examples
from hf_lora.recipes.encoding import IGNORED
from hf_lora.recipes.estimate import (
    adapter_bytes,
    available_bytes,
    base_bytes,
    faster_type,
    seconds,
    step_bytes,
)
from hf_lora.recipes.file import read_recipe
from hf_lora.recipes.progress import bars
from hf_lora.recipes.recipe import Recipe
from hf_lora.recipes.tasks import TASKS, labelled
from hf_lora.recipes.trainer_arguments import arguments, learning_rates

_SHOWN = 3
_QUANTIZED_BITS = {"load_in_4bit": 4, "load_in_8bit": 8}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens in a row of which all are learned, or none."""

    text: str
    tokens: int
    learned: bool


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a recipe would do."""

    sources: tuple[str, ...]
    rows: tuple[tuple[Piece, ...], ...]
    """The first rows, in the pieces that the model sees."""

    train_examples: int
    eval_examples: int
    counts: Counts
    max_length: int
    tokens: int
    """In one epoch."""

    learned: int
    """Of these, those that count for the loss."""

    padded: int
    """In one epoch, with what fills the batches."""

    batch: int
    """Rows in a step of the optimizer, on this machine."""

    steps: int
    epochs: float
    trained: int
    """Parameters of the adapter."""

    base_bytes: int
    adapter_bytes: int
    step_bytes: int
    """Estimated, of what is kept between forward and backward in the largest batch."""

    available_bytes: int
    seconds: float
    """Estimated, for all learning rates together."""

    faster: str | None
    """A type that the base would train faster in, here."""

    learning_rates: tuple[float, ...]
    output: Path

    @property
    def memory(self) -> int:
        """All of it, in bytes."""
        return self.base_bytes + self.adapter_bytes + self.step_bytes


def preview(
    source: str | os.PathLike[str] | Mapping[str, Any],
    settings: Iterable[str] = (),
    output: Path | None = None,
) -> Preview:
    """Return what training by a recipe would do; no weight is loaded, and nothing is written.

    Args:
        source: As for :func:`hf_lora.train`.
        settings: Likewise.
        output: Likewise.

    Raises:
        ConfigError: The recipe, the data or the base cannot be used.
        TargetError: The adapter does not fit the base.
    """
    recipe = read_recipe(source, settings, output)
    config = load_config(recipe.base)
    task = TASKS[recipe.task]
    task.check(config)
    tokenizer = load_tokenizer(recipe.base)
    lora = with_row_numbers(recipe.lora, tokenizer)
    with bars() as progress:
        bar = progress.add_task("reading the data", total=None)
        examples = load_examples(
            recipe.data,
            tokenizer,
            config,
            int(recipe.trainer.get("seed", 42)),
            lambda rows: progress.update(bar, completed=rows),
            shapes=task.shapes,
            forms=task.forms,
        )
        if recipe.task == "classification":
            examples = labelled(examples)
    for name, value in task.load_options(examples, tokenizer).items():
        setattr(config, name, value)
    found = plan(skeleton(config, task.loader), config=lora)
    if found.problems:
        raise TargetError(listing("The adapter does not fit the base", found.problems))
    return _preview(recipe, config, tokenizer, examples, found)


def _preview(recipe: Recipe, config: Any, tokenizer: Any, examples: Any, found: Plan) -> Preview:
    rates = learning_rates(recipe)
    args = arguments(recipe, rates[0], recipe.output)
    shown = [pieces(example, tokenizer, examples.labels) for example in examples.train]
    lengths = [min(sum(p.tokens for p in row), examples.max_length) for row in shown]
    batch = args.per_device_train_batch_size
    per_step = batch * args.gradient_accumulation_steps
    an_epoch = max(1, math.ceil(math.ceil(len(lengths) / batch) / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(an_epoch * args.num_train_epochs)
    padded = _padded(lengths, batch, args.seed)
    quantized = [bits for name, bits in _QUANTIZED_BITS.items() if getattr(recipe.base, name)]
    said = recipe.base.dtype
    dtype = (config.dtype if said == "auto" else getattr(torch, said)) or torch.float32
    largest = sum(sorted(lengths)[-1:]) * min(batch, len(lengths))
    return Preview(
        sources=examples.sources,
        rows=tuple(shown[:_SHOWN]),
        train_examples=len(examples.train),
        eval_examples=len(examples.eval or []),
        counts=examples.counts,
        max_length=examples.max_length,
        tokens=sum(lengths),
        learned=sum(p.tokens for row in shown for p in row if p.learned),
        padded=padded,
        batch=per_step,
        steps=steps,
        epochs=round(steps / an_epoch, 2),
        trained=found.parameters,
        base_bytes=base_bytes(found, dtype, bits=quantized[0] if quantized else None),
        adapter_bytes=adapter_bytes(found),
        step_bytes=step_bytes(
            config, largest, dtype.itemsize, checkpointing=bool(args.activation_checkpointing)
        ),
        available_bytes=available_bytes(),
        seconds=len(rates) * seconds(found, round(padded * steps / an_epoch), dtype),
        faster=faster_type(dtype),
        learning_rates=tuple(rates),
        output=recipe.output,
    )


def pieces(example: Example, tokenizer: Any, names: Sequence[str | int] = ()) -> tuple[Piece, ...]:
    """Return a row's text in pieces that are learned, and pieces that are not.

    Args:
        example: As the task's trainer is given it.
        tokenizer: The base's.
        names: A classifier's labels.
    """
    if "chosen" in example:
        return _preference_pieces(example, tokenizer)
    ids = example["input_ids"]
    if "label" in example:
        read = Piece(text=tokenizer.decode(ids), tokens=len(ids), learned=False)
        answer = Piece(text=str(names[example["label"]]), tokens=0, learned=True)
        return (read, Piece(text="\nlabel: ", tokens=0, learned=False), answer)
    labels = example["labels"]
    learned = [number > 0 and label != IGNORED for number, label in enumerate(labels)]
    found, start = [], 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or learned[stop] != learned[start]:
            text = tokenizer.decode(ids[start:stop])
            found.append(Piece(text=text, tokens=stop - start, learned=learned[start]))
            start = stop
    return tuple(found)


def _preference_pieces(example: Example, tokenizer: Any) -> tuple[Piece, ...]:
    """Return a prompt and its two answers; TRL puts messages through the chat template."""

    def piece(name: str) -> Piece:
        said = example.get(name, "")
        text = said if isinstance(said, str) else "\n".join(str(m.get("content", m)) for m in said)
        count = len(tokenizer(text)["input_ids"]) if text else 0
        return Piece(text=text, tokens=count, learned=name != "prompt")

    def words(text: str) -> Piece:
        return Piece(text=text, tokens=0, learned=False)

    prompt = (piece("prompt"), words("\n")) if "prompt" in example else ()
    chosen, rejected = piece("chosen"), piece("rejected")
    return (*prompt, words("chosen: "), chosen, words("\nrejected: "), rejected)


def _padded(lengths: Sequence[int], batch: int, seed: int) -> int:
    """Return the tokens of an epoch with what fills the batches, for one order of the rows."""
    order = random.Random(seed).sample(list(lengths), len(lengths))
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    return sum(max(part) * len(part) for part in parts)
