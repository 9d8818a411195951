"""Plain data into frozen records: unknown, missing and mistyped fields, all of them at once."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_lora.peft_names import hint

Record = TypeVar("Record")
Convert = Callable[[Any], Any]

_MOST_NAMES = 16
"""More of them than this nobody reads."""

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
    hints: Callable[[str], str] = hint,
) -> Record | None:
    """Build a frozen record from a mapping; report into ``problems`` and return None if it fails.

    Args:
        cls: A dataclass.
        content: What the file says.
        label: Where it says it; put before every problem.
        problems: One line each is added.
        convert: Field to a function that turns its content into its value, instead of a look at
            the field's type; it reports what is wrong itself.
        hints: As for :func:`report_unknown`.
    """
    convert = convert or {}
    if not isinstance(content, Mapping):
        problems.append(f"{label or 'the recipe'}: {content!r} is not a mapping of fields")
        return None
    before = len(problems)
    kinds = typing.get_type_hints(cls)
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    report_unknown(content, [field.name for field in known], label, problems, hints)
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
        fault = mismatch(value, kinds[field.name])
        if fault:
            problems.append(f"{where}: {fault}")
        values[field.name] = value
    return cls(**values) if len(problems) == before else None


def report_unknown(
    content: Mapping[Any, Any],
    known: Collection[str],
    label: str,
    problems: list[str],
    hints: Callable[[str], str] = hint,
) -> None:
    """Add a line for each field that does not exist: what it is called here, or those like it.

    Args:
        content: What the file says.
        known: The fields that there are.
        label: Where it says it.
        problems: One line each is added.
        hints: What to say of a name, if it is known from elsewhere; empty if it is not.
    """
    for name in content:
        if name not in known:
            said = str(name)
            problems.append(
                f"{dotted(label, said)}: unknown field{hints(said) or like(said, known)}"
            )


def like(name: str, known: Collection[str]) -> str:
    """Return what else somebody may have meant, as the end of a line."""
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.7)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if len(known) <= _MOST_NAMES else ""


def folder_or_id(said: str, folder: Path, label: str, problems: list[str]) -> str:
    """Return the path of a folder, or an id on the Hub as it is; report what is neither."""
    if (folder / said).exists():
        return str((folder / said).resolve())
    try:
        validate_repo_id(said)
    except HFValidationError:
        problems.append(f"{label}: {folder / said} is no folder, and {said!r} no id on the Hub")
    return said


def mapping(value: Any, label: str, problems: list[str]) -> Mapping[str, Any]:
    """Return a mapping of anything; report what is none."""
    if not isinstance(value, Mapping):
        problems.append(f"{label}: {value!r} is not a mapping of fields")
        return {}
    return dict(value)


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
