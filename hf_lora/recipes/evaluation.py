"""How well a language model predicts some rows: the loss and the share of tokens that are right."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lora.errors import ConfigError
from hf_lora.recipes.dataset import Example, collate, load_examples
from hf_lora.recipes.encoding import IGNORED
from hf_lora.recipes.recipe import FILE_KINDS, FORMS, Data, DataSet, Files, Source
from hf_lora.recipes.rows import read_rows


@dataclasses.dataclass(frozen=True)
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
        form: ``text``, ``completion`` or ``chat``; by default what the first row's columns say.
        split: Of a data set.
        max_length: Longer rows are cut to so many tokens.
        progress: Called with the number of rows read.

    Raises:
        ConfigError: There is no such file, or rows cannot be read in this form; each is named.
    """
    source: Source
    path = Path(data)
    if path.suffix in FILE_KINDS:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        source = Files((path,))
    else:
        source = DataSet(dataset=data, split=split)
    known = form or _form_of(source)
    if known not in FORMS:
        raise ConfigError(f"{known!r} is not one of {', '.join(FORMS)}")
    wanted = Data(
        train=source,
        form=known,  # type: ignore[arg-type]
        loss="all" if known == "text" else "completions",
        max_length=max_length,
    )
    return load_examples(wanted, tokenizer, config, 0, progress).train


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


def _form_of(source: Source) -> str:
    """Return the form whose columns the first row has."""
    _, row = next(read_rows(source, Data(train=source, form="text")), ("", {}))
    found = [form for form, columns in FORMS.items() if all(row.get(c) for c in columns)]
    if len(found) != 1:
        raise ConfigError(
            f"{source}: the first row has the columns {', '.join(row) or 'none'}; "
            f"say the form: {', '.join(FORMS)}"
        )
    return found[0]
