"""Plain data into frozen records: unknown, missing and mistyped fields, all of them at once."""

import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from hf_lora.peft_names import hint

Record = TypeVar("Record")
Convert = Callable[[Any], Any]

_SIMPLE = (str, int, float, bool, type(None))
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "nothing",
}


def record(
    cls: type[Record],
    content: Any,
    label: str,
    problems: list[str],
    convert: Mapping[str, Convert] | None = None,
) -> Record | None:
    """Build a frozen record from a mapping; report into ``problems`` and return None if it fails.

    Args:
        cls: A dataclass.
        content: What the file says.
        label: Where it says it; put before every problem.
        problems: One line each is added.
        convert: Field to a function that turns its content into its value, instead of a look at
            the field's type; it reports what is wrong itself.
    """
    convert = convert or {}
    if not isinstance(content, Mapping):
        problems.append(f"{label or 'the recipe'}: {content!r} is not a mapping of fields")
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls)
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    report_unknown(content, [field.name for field in known], label, problems)
    values = {}
    for field in known:
        where = dotted(label, field.name)
        if field.name not in content:
            if (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                problems.append(f"{where}: is missing")
            continue
        value = content[field.name]
        if field.name in convert:
            values[field.name] = convert[field.name](value)
            continue
        fault = mismatch(value, hints[field.name])
        if fault:
            problems.append(f"{where}: {fault}")
        values[field.name] = value
    return cls(**values) if len(problems) == before else None


def report_unknown(
    content: Mapping[Any, Any], known: Collection[str], label: str, problems: list[str]
) -> None:
    """Add a line for each field that does not exist, naming those that do."""
    for name in content:
        if name not in known:
            names = ", ".join(known)
            here = hint(str(name))
            problems.append(f"{dotted(label, str(name))}: unknown field{here}; known: {names}")


def mismatch(value: Any, hint: Any) -> str | None:
    """Say why a value is not of a type, or return None; only simple types are judged."""
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    literals = [v for o in options if typing.get_origin(o) is typing.Literal for v in o.__args__]
    kinds = [option for option in options if typing.get_origin(option) is not typing.Literal]
    if any(kind not in _SIMPLE for kind in kinds):
        return None
    if value in literals or any(_is(value, kind) for kind in kinds):
        return None
    words = [_WORDS[kind] for kind in kinds if kind is not type(None)]
    if literals:
        words.append(f"one of {', '.join(map(str, literals))}")
    return f"{value!r} is not {' or '.join(words)}"


def dotted(label: str, name: str) -> str:
    """Return the address of a field in the file."""
    return f"{label}.{name}" if label else name


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
