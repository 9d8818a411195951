"""How well a language model predicts some rows: the loss and the share of tokens that are right."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_lora.errors import ConfigError
from hf_lora.recipes.data import FILE_KINDS, Data, DataSet, Files, Part
from hf_lora.recipes.dataset import Example, collate, load_examples, resolved
from hf_lora.recipes.encoding import IGNORED
from hf_lora.recipes.forms import LANGUAGE


@dataclass(frozen=True)
class Score:
    """How well the learned tokens of some rows are predicted."""

    loss: float
    """The mean over tokens of minus the logarithm of the right one's probability, in nats."""

    accuracy: float
    """The share of tokens for which the right one is the likeliest."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


def rows_of(
    data: str,
    tokenizer: Any,
    config: Any,
    *,
    form: str | None = None,
    split: str = "test",
    max_length: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Example]:
    """Read and encode rows, of which completions and the assistant's turns are counted alone.

    Args:
        data: A file, or the id or folder of a data set.
        tokenizer: The model's.
        config: The model's.
        form: One of ``text``, ``completion``, ``chat``, ``sharegpt``, ``alpaca``; by default what
            the first row's columns say.
        split: Of a data set.
        max_length: Longer rows are cut to so many tokens.
        progress: Called with the number of rows read.

    Raises:
        ConfigError: There is no such file, or rows cannot be read in this form; each is named.
    """
    source: Files | DataSet
    path = Path(data)
    if path.suffix in FILE_KINDS:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        source = Files((path,))
    else:
        source = DataSet(dataset=data, split=split)
    if form is not None and form not in LANGUAGE:
        raise ConfigError(f"{form!r} is not one of {', '.join(LANGUAGE)}")
    wanted = Data(train=source, form=form, max_length=max_length)  # type: ignore[arg-type]
    wanted = resolved(Part(source=source), wanted)
    loss = "all" if wanted.form == "text" else "completions"
    return load_examples(replace(wanted, loss=loss), tokenizer, config, 0, progress).train


def score(
    model: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda rows: None,
) -> Score:
    """Return how well a model predicts examples.

    Args:
        model: A causal language model, in evaluation mode.
        examples: As :func:`rows_of` gives them.
        batch_size: Rows at a time; rows of similar lengths are taken together.
        progress: Called with the number of rows that are done.
    """
    loss, right, count = 0.0, 0, 0
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size])
        labels = batch.pop("labels")[:, 1:].to(model.device)
        with torch.inference_mode():
            logits = model(**{k: t.to(model.device) for k, t in batch.items()}).logits[:, :-1]
            counted = labels != IGNORED
            logits, labels = logits[counted].float(), labels[counted]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            loss += losses.double().sum().item()
            right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
        progress(min(start + batch_size, len(ordered)))
    return Score(loss=loss / count, accuracy=right / count)
