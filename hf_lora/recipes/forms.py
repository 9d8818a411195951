"""The forms that rows of data come in, told from their columns; and what each is for a model.

Chats as OpenAI writes them (``messages`` with a role and a content), as ShareGPT does
(``conversations`` with ``from`` and ``value``), instructions as Alpaca has them, prompts with what
follows them, plain text, pairs of a chosen and a rejected answer, texts with a label.
"""

import dataclasses
import json
import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Form = Literal["text", "completion", "chat", "sharegpt", "alpaca", "preference", "label"]

FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text": ("text",),
        "completion": ("prompt", "completion"),
        "chat": ("messages",),
        "sharegpt": ("conversations",),
        "alpaca": ("instruction", "output"),
        "preference": ("chosen", "rejected"),
        "label": ("text", "label"),
    }
)
"""Form of the data to the columns that it reads, by the names that they usually have."""

MAY_HAVE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chat": ("tools",),
        "sharegpt": ("tools", "system"),
        "alpaca": ("input", "system"),
        "preference": ("prompt", "tools"),
    }
)
"""Form to the columns that it reads where they are there."""

CHATS = ("chat", "sharegpt")
"""The forms that nothing but a chat template can write down."""

LANGUAGE: tuple[Form, ...] = ("text", "completion", "chat", "sharegpt", "alpaca")
"""The forms that a language model learns from."""

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("input", "output"),
    ("source", "target"),
)
_CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
_LABELS = ("label", "labels")
_TEXTS = ("text", "sentence", "content")

_SHAREGPT_ROLES = MappingProxyType(
    {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
        "bot": "assistant",
        "system": "system",
        "tool": "tool",
        "observation": "tool",
        "function_response": "tool",
        "function_call": "assistant",
    }
)

ALPACA = (
    "Below is an instruction that describes a task{input}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)
"""The prompt of Stanford's Alpaca, for models without a chat template."""


class RowFault(Exception):
    """What is wrong with one row; the reader of the data knows where that row stands."""


@dataclasses.dataclass(frozen=True)
class Recognized:
    """What rows are, told from one of them."""

    form: Form
    columns: Mapping[str, str]
    """The form's name of a column to the one that it has here, where they differ."""

    def __str__(self) -> str:
        """Return the form and its columns."""
        names = [self.columns.get(name, name) for name in FORMS[self.form]]
        return f"{self.form} ({', '.join(names)})"


def recognize(row: Mapping[str, Any]) -> Recognized | None:
    """Return the form of a row; None if its columns fit none, or several alike."""
    found = _chat(row) or _preference(row) or _alpaca(row)
    if found:
        return found
    pairs = [pair for pair in _PAIRS if all(isinstance(row.get(c), str) for c in pair)]
    texts = [name for name in _TEXTS if isinstance(row.get(name), str)]
    labels = [name for name in _LABELS if isinstance(row.get(name), (str, int))]
    if pairs and not texts:
        return _named("completion", pairs[0])
    if texts and labels and not pairs:
        return _named("label", (texts[0], labels[0]))
    if texts and not pairs:
        return _named("text", texts[:1])
    return None


def _named(form: Form, names: Any) -> Recognized:
    pairs = zip(FORMS[form], names, strict=True)
    return Recognized(form, {usual: name for usual, name in pairs if usual != name})


def _chat(row: Mapping[str, Any]) -> Recognized | None:
    for name in _CONVERSATIONS:
        turns = row.get(name)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, Mapping) and "role" in first:
            return _named("chat", [name])
        if isinstance(first, Mapping) and "from" in first:
            return _named("sharegpt", [name])
    return None


def _preference(row: Mapping[str, Any]) -> Recognized | None:
    has_both = all(row.get(name) is not None for name in FORMS["preference"])
    return Recognized("preference", {}) if has_both else None


def _alpaca(row: Mapping[str, Any]) -> Recognized | None:
    has_both = all(isinstance(row.get(name), str) for name in FORMS["alpaca"])
    return Recognized("alpaca", {}) if has_both else None


def sharegpt_messages(turns: Any, system: Any = None) -> list[dict[str, Any]]:
    """Return ShareGPT's turns as messages.

    Args:
        turns: Mappings with ``from`` and ``value``.
        system: What the system says first, where it has a column of its own.

    Raises:
        RowFault: One is no such mapping, or speaks for nobody that is known.
    """
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"the conversations are {type(turns).__name__}, not a list of some")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise RowFault(f"turn {number} has no from and value; it is {turn!r}")
        role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise RowFault(f"turn {number} is from {turn['from']!r}; known: {known}")
        if turn["from"] == "function_call":
            call = parsed(turn["value"], f"turn {number}, a function_call,")
            messages.append({"role": role, "tool_calls": [{"type": "function", "function": call}]})
        else:
            messages.append({"role": role, "content": turn["value"]})
    return messages


def alpaca_messages(row: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return an instruction, what it is about and its answer as a chat."""
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    system = row.get("system")
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": asked},
        {"role": "assistant", "content": row["output"]},
    ]


def alpaca_prompt(row: Mapping[str, str]) -> str:
    """Return the prompt of an instruction, in the words of Alpaca."""
    given = row.get("input")
    return ALPACA.format(
        instruction=row["instruction"],
        input=", paired with an input that provides further context" if given else "",
        given=f"### Input:\n{given}\n\n" if given else "",
    )


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Return messages as chat templates take them, tool calls with their arguments as mappings.

    Raises:
        RowFault: They are no list of mappings with a role, and a content or tool calls.
    """
    if not isinstance(value, list) or not value:
        raise RowFault(f"the messages are {type(value).__name__}, not a list of some")
    messages = []
    for number, said in enumerate(value, 1):
        if not isinstance(said, Mapping) or not isinstance(said.get("role"), str):
            raise RowFault(f"message {number} has no role; it is {said!r}")
        # a data set's table fills the fields that only other rows have with nothing
        message = {name: item for name, item in said.items() if item is not None}
        if "tool_calls" in message:
            message["tool_calls"] = _calls(message["tool_calls"], number)
        elif "content" not in message:
            raise RowFault(f"message {number} has no content")
        # templates ask for it, and OpenAI leaves it out beside calls
        messages.append({"content": "", **message} if "content" not in message else message)
    return messages


def checked_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a row as chat templates take them; they may be JSON in a string.

    Raises:
        RowFault: They are no list of mappings.
    """
    tools = parsed(value, "the column tools") if isinstance(value, str) and value else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowFault("the tools are not a list of mappings")
    return [dict(tool) for tool in tools]


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowFault(f"the tool_calls of message {number} are not a list of mappings")
    found = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowFault(f"a tool call of message {number} has no name; it is {call!r}")
        given = inner.get("arguments", {})
        if isinstance(given, str):  # OpenAI's way; templates write the mapping as JSON themselves
            given = parsed(given, f"the arguments of a tool call of message {number}")
        function = {**inner, "arguments": given}
        found.append({"type": "function", **call, "function": function})
    return found


def parsed(text: Any, what: str) -> Any:
    """Return what JSON in a row's string says.

    Raises:
        RowFault: It is no JSON.
    """
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowFault(f"{what} is not JSON: {error}") from error


def filled(template: str, row: Mapping[str, Any]) -> str:
    """Return a template such as ``"Question: {question}"`` with a row's columns in it.

    Raises:
        RowFault: A column is missing.
    """
    missing = [name for name in template_columns(template) if row.get(name) is None]
    if missing:
        raise RowFault(f"no column {', '.join(missing)}; it has {', '.join(row) or 'none'}")
    pieces = string.Formatter().parse(template)
    return "".join(text + ("" if name is None else str(row[name])) for text, name, _, _ in pieces)


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names.

    Raises:
        ValueError: A brace stands alone, or there is more in braces than a column's name.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or spec or conversion or any(sign in name for sign in ".["):
            raise ValueError(f"in braces stands the name of a column, not {name!r}")
        names.append(name)
    return names
