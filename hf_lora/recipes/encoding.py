"""A row of text becomes token ids and labels; a label of -100 is a token that is not learned."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from hf_lora.recipes.data import Data
from hf_lora.recipes.forms import (
    FORMS,
    MAY_HAVE,
    RowFault,
    alpaca_messages,
    alpaca_prompt,
    checked_messages,
    checked_tools,
    filled,
    sharegpt_messages,
)

IGNORED = -100

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template puts before the text that the assistant wrote, if it marks it at all."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example, before it is cut."""

    input_ids: list[int]
    labels: list[int]


class Encoder:
    """Encodes rows of one form with one tokenizer."""

    def __init__(self, tokenizer: Any, data: Data):
        self._tokenizer = tokenizer
        self._data = data
        form = data.form or "text"
        self._form = form
        self._names = {
            name: data.columns.get(name, name) for name in (*FORMS[form], *MAY_HAVE.get(form, ()))
        }
        self._needed = [self._names[name] for name in FORMS[form]] if data.prompt is None else []
        if data.prompt is not None and data.completion is None:
            self._needed = [data.columns.get("completion", "completion")]
        self._completions_only = data.loss == "completions"

    def __call__(self, row: Mapping[str, Any]) -> Encoded:
        """Encode one row.

        Raises:
            RowFault: A column is missing or of another kind, or the chat template says no.
        """
        missing = [column for column in self._needed if row.get(column) is None]
        if missing:
            raise RowFault(f"no column {', '.join(missing)}; it has {', '.join(row) or 'none'}")
        named = {name: row[column] for name, column in self._names.items() if column in row}
        if self._data.prompt is not None:
            return self._from_template(row)
        if self._form == "text":
            return self._text(named["text"])
        if self._form == "completion":
            return self._completion(named["prompt"], named["completion"])
        if self._form == "alpaca":
            return self._alpaca(named)
        return self._chat(self.messages(named), checked_tools(named.get("tools")))

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the messages of a row of a chat, whose columns have the form's own names."""
        if self._form == "sharegpt":
            return sharegpt_messages(row["conversations"], row.get("system"))
        return row["messages"]

    def _from_template(self, row: Mapping[str, Any]) -> Encoded:
        assert self._data.prompt is not None
        prompt = filled(self._data.prompt, row)
        if self._data.completion is not None:
            completion: Any = filled(self._data.completion, row)
        else:
            completion = row[self._data.columns.get("completion", "completion")]
        if self._form == "completion":
            return self._completion(prompt, completion)
        asked = {"role": "user", "content": prompt}
        return self._chat([asked, {"role": "assistant", "content": completion}])

    def _alpaca(self, row: Mapping[str, Any]) -> Encoded:
        for name, value in row.items():
            if value is not None:
                _string(value, f"the {name}")
        if self._tokenizer.chat_template:
            return self._chat(alpaca_messages(row))
        return self._completion(alpaca_prompt(row), row["output"])

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

    def _chat(self, messages: Any, tools: list[dict[str, Any]] | None = None) -> Encoded:
        messages = checked_messages(messages)
        if self._data.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._data.system}, *messages]
        text = self._render(messages, tools=tools)
        whole = [(0, len(text))]
        spans = self._turns(messages, text, tools) if self._completions_only else whole
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        labels = [
            token if any(start < to and end > at for at, to in spans) else IGNORED
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        if messages[-1]["role"] == "assistant":
            self._end_turn(text, ids, labels, offsets)
        return Encoded(ids, labels)

    def _turns(
        self, messages: list[dict[str, Any]], text: str, tools: list[dict[str, Any]] | None
    ) -> list[tuple[int, int]]:
        """Return where in the text the assistant speaks, with the mark that ends its turn.

        From the end of what the model is shown before it answers (the generation prompt) to the
        end of the turn; the space after the turn's mark comes from nobody.
        """
        marked = self._marked(messages, tools)
        if marked is not None:
            return marked
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise RowFault("the assistant speaks first, so there is nothing to complete")
            before = self._render(messages[:number], tools=tools, add_generation_prompt=True)
            after = self._render(messages[: number + 1], tools=tools).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise RowFault(
                    f"the chat template shows message {number + 1} differently depending on what "
                    "follows, so its tokens cannot be told from the others; mark the assistant's "
                    "turns in the template with {% generation %}, or use loss: all"
                )
            spans.append((len(before), len(after)))
        return spans

    def _marked(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[tuple[int, int]] | None:
        """Return the spans that the template itself marks, or None if it marks none."""
        template = self._tokenizer.get_chat_template()
        if not _MARK.search(template):
            return None
        rendered: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,  # type: ignore[arg-type]
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
