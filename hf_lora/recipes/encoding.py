"""A row of text becomes token ids and labels; a label of -100 is a token that is not learned."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from hf_lora.recipes.recipe import FORMS, Data

IGNORED = -100

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template puts before the text that the assistant wrote, if it marks it at all."""


class RowFault(Exception):
    """What is wrong with one row; the reader of the data knows where that row stands."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example, before it is cut."""

    input_ids: list[int]
    labels: list[int]


class Encoder:
    """Encodes rows of one form with one tokenizer."""

    def __init__(self, tokenizer: Any, data: Data):
        self._tokenizer = tokenizer
        self._columns = [data.columns.get(name, name) for name in FORMS[data.form]]
        self._completions_only = data.loss == "completions"
        self._encode: Callable[..., Encoded] = getattr(self, f"_{data.form}")

    def __call__(self, row: Mapping[str, Any]) -> Encoded:
        """Encode one row.

        Raises:
            RowFault: A column is missing or of another kind, or the chat template says no.
        """
        missing = [column for column in self._columns if row.get(column) is None]
        if missing:
            raise RowFault(f"no column {', '.join(missing)}; it has {', '.join(row) or 'none'}")
        return self._encode(*(row[column] for column in self._columns))

    def _text(self, text: Any) -> Encoded:
        ids = self._ended(self._ids(_string(text, "the text"), special=True))
        return Encoded(ids, list(ids))

    def _completion(self, prompt: Any, completion: Any) -> Encoded:
        # apart, as they are when the model is used: no token reaches across the boundary
        before = self._ids(_string(prompt, "the prompt"), special=True)
        if before and before[-1] == self._tokenizer.eos_token_id:
            before.pop()
        after = self._ended(self._ids(_string(completion, "the completion"), special=False))
        learned = [IGNORED] * len(before) if self._completions_only else before
        return Encoded(before + after, learned + after)

    def _chat(self, messages: Any) -> Encoded:
        messages = _messages(messages)
        text = self._render(messages)
        spans = self._turns(messages, text) if self._completions_only else [(0, len(text))]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [
            token if any(start < to and end > at for at, to in spans) else IGNORED
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        if messages[-1]["role"] == "assistant":
            self._end_turn(text, ids, labels, offsets)
        return Encoded(ids, labels)

    def _turns(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Return where in the text the assistant speaks, with the mark that ends its turn.

        From the end of what the model is shown before it answers (the generation prompt) to the
        end of the turn; the space after the turn's mark comes from nobody.
        """
        marked = self._marked(messages)
        if marked is not None:
            return marked
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise RowFault("the assistant speaks first, so there is nothing to complete")
            before = self._render(messages[:number], add_generation_prompt=True)
            after = self._render(messages[: number + 1]).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise RowFault(
                    f"the chat template shows message {number + 1} differently depending on what "
                    "follows, so its tokens cannot be told from the others; mark the assistant's "
                    "turns in the template with {% generation %}, or use loss: all"
                )
            spans.append((len(before), len(after)))
        return spans

    def _marked(self, messages: list[dict[str, Any]]) -> list[tuple[int, int]] | None:
        """Return the spans that the template itself marks, or None if it marks none."""
        template = self._tokenizer.get_chat_template()
        if not _MARK.search(template):
            return None
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in rendered[1][0]]

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template is a program; what it raises is up to it
            raise RowFault(f"the chat template refuses it: {error}") from error

    def _end_turn(
        self, text: str, ids: list[int], labels: list[int], offsets: Sequence[tuple[int, int]]
    ) -> None:
        """Put the end of text where the template ends the last turn with no mark of its own."""
        last = len(text.rstrip())
        while ids and offsets[len(ids) - 1][0] >= last:
            ids.pop()
            labels.pop()
        special = {*self._tokenizer.all_special_ids, *self._special_added()}
        if ids and ids[-1] not in special and self._tokenizer.eos_token_id is not None:
            ids.append(self._tokenizer.eos_token_id)
            labels.append(self._tokenizer.eos_token_id)

    def _special_added(self) -> list[int]:
        added = self._tokenizer.added_tokens_decoder
        return [number for number, token in added.items() if token.special]

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowFault(f"{what} is {type(value).__name__}, not text")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowFault(f"the messages are {type(value).__name__}, not a list of some")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowFault(f"message {number} has no role; it is {message!r}")
        # a data set's table fills the fields that only other rows have with nothing
        messages.append({name: item for name, item in message.items() if item is not None})
        if "content" not in messages[-1]:
            raise RowFault(f"message {number} has no content")
    return messages
