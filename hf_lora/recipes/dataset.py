"""From a recipe's data section to what Trainer is given: examples, held-out ones, and batches."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_lora.errors import ConfigError, listing
from hf_lora.recipes.encoding import IGNORED, Encoder, RowFault
from hf_lora.recipes.recipe import Data, DataSet, Files, Source
from hf_lora.recipes.rows import read_rows

DEFAULT_LENGTH = 1024
_MOST_FAULTS = 100

Example = dict[str, Any]
"""``input_ids`` and ``labels`` as arrays of int32: a quarter of what lists of ints take."""


@dataclasses.dataclass
class Counts:
    """What happened to the rows on the way."""

    rows: int = 0
    cut: int = 0
    """Rows that were longer than ``max_length``."""

    dropped: int = 0
    """Rows in which nothing is left to learn, for instance because the prompt alone is too long."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """All that is trained and evaluated on."""

    train: list[Example]
    eval: list[Example] | None
    counts: Counts
    max_length: int


def load_examples(
    data: Data,
    tokenizer: Any,
    config: Any,
    seed: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Examples:
    """Read, encode and cut all rows, and hold some out if the recipe says so.

    Args:
        data: The recipe's section.
        tokenizer: The base's tokenizer.
        config: The base's configuration, which says how much it can read and which ids it knows.
        seed: Decides which rows are held out.
        progress: Called with the number of rows read.

    Raises:
        ConfigError: One line for each row that cannot be used; or there is nothing to train on.
    """
    _check_tokenizer(tokenizer, data)
    length = _length(data, config)
    counts = Counts()
    encoder = Encoder(tokenizer, data)
    train = _read(data.train, data, encoder, length, counts, progress)
    held: list[Example] | None = None
    if isinstance(data.eval, (Files, DataSet)):
        held = _read(data.eval, data, encoder, length, counts, progress)
    elif data.eval is not None:
        train, held = _hold_out(train, data.eval, seed)
    if data.packing:
        train = _pack(train, length)
        held = held and _pack(held, length)
    for name, found in (("train", train), ("eval", held)):
        if found is not None and not found:
            raise ConfigError(f"data.{name}: there is nothing in it to learn from")
    _check_ids([*train, *(held or [])], config)
    return Examples(train, held, counts, length)


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch: padded on the right, the padding neither attended to nor learned."""
    longest = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), longest)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        count = len(example["input_ids"])
        ids[row, :count] = torch.from_numpy(example["input_ids"])
        labels[row, :count] = torch.from_numpy(example["labels"])
        mask[row, :count] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _check_tokenizer(tokenizer: Any, data: Data) -> None:
    if data.form != "chat":
        return
    if not tokenizer.chat_template:
        raise ConfigError(
            "data.form: the tokenizer has no chat template; take an instruct model's with "
            "base.tokenizer, or another form"
        )
    if not tokenizer.is_fast:
        raise ConfigError("data.form: chat needs a fast tokenizer, and this base has a slow one")


def _length(data: Data, config: Any) -> int:
    can = getattr(config.get_text_config(), "max_position_embeddings", None)
    if data.max_length is None:
        return min(DEFAULT_LENGTH, can or DEFAULT_LENGTH)
    if can is not None and data.max_length > can:
        raise ConfigError(
            f"data.max_length: {data.max_length}, but the base reads {can} tokens at most"
        )
    return data.max_length


def _read(
    source: Source,
    data: Data,
    encoder: Encoder,
    length: int,
    counts: Counts,
    progress: Callable[[int], None],
) -> list[Example]:
    examples: list[Example] = []
    faults: list[str] = []
    for where, row in read_rows(source, data):
        counts.rows += 1
        progress(counts.rows)
        try:
            encoded = encoder(row)
        except RowFault as fault:
            faults.append(f"{where}: {fault}")
            if len(faults) == _MOST_FAULTS:
                break
            continue
        cut = len(encoded.input_ids) > length and not data.packing
        counts.cut += cut
        ids = np.array(encoded.input_ids[: length if cut else None], dtype=np.int32)
        labels = np.array(encoded.labels[: length if cut else None], dtype=np.int32)
        # the first token is predicted by nothing, so its label is never learned
        if not data.packing and not (labels[1:] != IGNORED).any():
            counts.dropped += 1
            continue
        examples.append({"input_ids": ids, "labels": labels})
    if faults:
        raise ConfigError(listing(f"{source} cannot be read as {data.form}", faults))
    return examples


def _hold_out(
    examples: list[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    count = max(1, round(share * len(examples)))
    chosen = set(random.Random(seed).sample(range(len(examples)), min(count, len(examples))))
    kept = [example for number, example in enumerate(examples) if number not in chosen]
    return kept, [examples[number] for number in sorted(chosen)]


def _pack(examples: list[Example], length: int) -> list[Example]:
    """Join all examples and cut them into blocks; the last block may be shorter."""
    if not examples:
        return []
    joined = np.concatenate([example["input_ids"] for example in examples])
    blocks = [joined[start : start + length] for start in range(0, len(joined), length)]
    return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]


def _check_ids(examples: list[Example], config: Any) -> None:
    known = getattr(config.get_text_config(), "vocab_size", None)
    most = max(int(example["input_ids"].max()) for example in examples)
    if known is not None and most >= known:
        raise ConfigError(
            f"base.tokenizer: it makes the token {most}, and the base knows {known} tokens; "
            "it is another model's"
        )
