"""From a recipe's data section to what Trainer is given: examples, held-out ones, and batches."""

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hf_lora.errors import ConfigError, listing
from hf_lora.recipes.data import Data, DataSet, Files, Mix, Part, Source
from hf_lora.recipes.encoding import IGNORED, Encoder
from hf_lora.recipes.forms import CHATS, LANGUAGE, Recognized, RowFault, recognize
from hf_lora.recipes.rows import read_rows

DEFAULT_LENGTH = 1024
_MOST_FAULTS = 100

Example = dict[str, Any]
"""``input_ids`` and ``labels`` as arrays of int32: a quarter of what lists of ints take."""


Shape = Callable[[Mapping[str, Any]], tuple[Example | None, bool]]
"""From a row to an example, or None if there is nothing to learn in it; and whether it was cut."""


@dataclasses.dataclass
class Counts:
    """What happened to the rows on the way."""

    rows: int = 0
    cut: int = 0
    """Rows that were longer than ``max_length``."""

    dropped: int = 0
    """Rows in which nothing is left to learn, for instance because the prompt alone is too long."""

    unused: int = 0
    """Rows of sources of which there are more than their share."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """All that is trained and evaluated on."""

    train: list[Example]
    eval: list[Example] | None
    counts: Counts
    max_length: int
    sources: tuple[str, ...] = ()
    """What each source was read as, in words."""

    labels: tuple[str | int, ...] = ()
    """The classes that a classifier tells apart; their number in a row is the place here."""


def language_rows(tokenizer: Any, data: Data, length: int) -> Shape:
    """Return what makes examples for a language model out of rows."""
    _check_tokenizer(tokenizer, data)
    if data.form == "text" and data.loss == "completions":
        raise ConfigError(
            "data.loss: plain text has no completions; use all, or another form of data"
        )
    if data.form != "text" and data.packing:
        raise ConfigError(f"data.packing: for text only, the form is {data.form}")
    encoder = Encoder(tokenizer, data)

    def shape(row: Mapping[str, Any]) -> tuple[Example | None, bool]:
        encoded = encoder(row)
        cut = len(encoded.input_ids) > length and not data.packing
        ids = np.array(encoded.input_ids[: length if cut else None], dtype=np.int32)
        labels = np.array(encoded.labels[: length if cut else None], dtype=np.int32)
        # the first token is predicted by nothing, so its label is never learned
        nothing = not data.packing and not (labels[1:] != IGNORED).any()
        return (None if nothing else {"input_ids": ids, "labels": labels}), cut

    return shape


def load_examples(
    data: Data,
    tokenizer: Any,
    config: Any,
    seed: int,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    shapes: Callable[[Any, Data, int], Shape] = language_rows,
    forms: Collection[str] = LANGUAGE,
) -> Examples:
    """Read, encode and cut all rows, and hold some out if the recipe says so.

    Args:
        data: The recipe's section.
        tokenizer: The base's tokenizer.
        config: The base's configuration, which says how much it can read and which ids it knows.
        seed: Decides which rows are held out, and which of a source that has more than its share.
        progress: Called with the number of rows read.
        shapes: What makes examples out of rows, for a tokenizer, a source and a length.
        forms: Those that it takes.

    Raises:
        ConfigError: One line for each row that cannot be used; or there is nothing to train on.
    """
    length = _length(data, config)
    reader = _Reader(data, tokenizer, length, shapes, forms, seed, progress)
    train = reader.read(data.train)
    held: list[Example] | None = None
    if isinstance(data.eval, (Files, DataSet, Mix)):
        held = reader.read(data.eval)
    elif data.eval is not None:
        train, held = _hold_out(train, data.eval, seed)
    if data.packing:
        train = _pack(train, length)
        held = held and _pack(held, length)
    for name, found in (("train", train), ("eval", held)):
        if found is not None and not found:
            raise ConfigError(f"data.{name}: there is nothing in it to learn from")
    _check_ids([*train, *(held or [])], config)
    return Examples(train, held, reader.counts, length, tuple(reader.sources))


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
    by_template = data.form in CHATS or (data.form == "alpaca" and tokenizer.chat_template)
    if not by_template:
        return
    if not tokenizer.chat_template:
        raise ConfigError(
            f"data.form: {data.form} is written down by a chat template, and the tokenizer has no "
            "chat template; take an instruct model's with base.tokenizer, or another form"
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


class _Reader:
    """Reads sources; counts what becomes of their rows, and remembers what they were taken for."""

    def __init__(
        self,
        data: Data,
        tokenizer: Any,
        length: int,
        shapes: Callable[[Any, Data, int], Shape],
        forms: Collection[str],
        seed: int,
        progress: Callable[[int], None],
    ):
        self._data, self._tokenizer, self._length = data, tokenizer, length
        self._shapes, self._forms, self._seed, self._progress = shapes, forms, seed, progress
        self.counts = Counts()
        self.sources: list[str] = []

    def read(self, source: Source) -> list[Example]:
        if not isinstance(source, Mix):
            return self._part(Part(source=source))
        every = [self._part(part) for part in source.parts]
        shares = [part.share for part in source.parts]
        given = [share for share in shares if share is not None]
        if len(given) < len(every):
            return [example for examples in every for example in examples]
        whole = min(len(found) / share for found, share in zip(every, given, strict=True))
        chosen = []
        for found, share in zip(every, given, strict=True):
            count = min(len(found), round(whole * share))
            picked = random.Random(self._seed).sample(range(len(found)), count)
            chosen += [found[number] for number in sorted(picked)]
            self.counts.unused += len(found) - count
        return chosen

    def _part(self, part: Part) -> list[Example]:
        data = resolved(part, self._data, self._forms)
        shape = self._shapes(self._tokenizer, data, self._length)
        examples: list[Example] = []
        faults: list[str] = []
        for where, row in read_rows(part.source, data):
            self.counts.rows += 1
            self._progress(self.counts.rows)
            try:
                example, cut = shape(row)
            except RowFault as fault:
                faults.append(f"{where}: {fault}")
                if len(faults) == _MOST_FAULTS:
                    break
                continue
            self.counts.cut += cut
            self.counts.dropped += example is None
            examples += [] if example is None else [example]
        if faults:
            raise ConfigError(listing(f"{part} cannot be read as {data.form}", faults))
        words = str(Recognized(data.form, data.columns)) if data.form else "nothing"
        self.sources.append(f"{part}: {len(examples):,} rows as {words}")
        return examples


def resolved(part: Part, data: Data, forms: Collection[str] = LANGUAGE) -> Data:
    """Return the data section as it is for one source: its form and its columns.

    Raises:
        ConfigError: The form is not said, and cannot be told; or it is of no use for the task.
    """
    form, columns = part.form or data.form, part.columns or data.columns
    if form is None:
        plain = dataclasses.replace(data, form="text", columns={})
        _, row = next(read_rows(part.source, plain), ("", {}))
        found = recognize(row)
        if found is None or found.form not in forms:
            seen = f", which looks like {found}" if found else ""
            raise ConfigError(
                f"{part}: the first row has the columns {', '.join(row) or 'none'}{seen}; "
                f"say the form: {', '.join(forms)}"
            )
        form, columns = found.form, found.columns
    if form not in forms:
        raise ConfigError(f"data.form: {form} is not one of {', '.join(forms)}, as this task needs")
    return dataclasses.replace(data, form=form, columns=columns)


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
    if any("input_ids" not in example for example in examples):
        return  # not encoded here
    most = max(int(example["input_ids"].max()) for example in examples)
    if known is not None and most >= known:
        raise ConfigError(
            f"base.tokenizer: it makes the token {most}, and the base knows {known} tokens; "
            "it is another model's"
        )
