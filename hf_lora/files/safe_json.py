"""JSON that a stranger may have written: bounded, and without duplicate names."""

import collections
import json
import os
import re
from pathlib import Path
from typing import Any

from hf_lora.errors import AdapterFileError
from hf_lora.files.opened import opened
from hf_lora.text import show

_LARGEST = 16_000_000
_MOST_VALUES = 1_500_000
_VALUE = re.compile(rb"[\[{,]")
_DEEPEST = 50


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that should hold a mapping.

    Raises:
        AdapterFileError: Missing, no ordinary file, too large, not JSON, or not a mapping.
    """
    if not os.path.lexists(path):
        raise AdapterFileError(f"{path} is missing; an adapter has one beside its weights")
    with opened(path) as (file, size):
        if size > _LARGEST:
            raise AdapterFileError(f"{path} is larger than {_LARGEST} bytes")
        text = file.read(size)
    return parse_json(text, str(path))


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """Parse JSON in UTF-8 whose top level should be a mapping.

    Raises:
        AdapterFileError: Something else, a name that stands twice in one mapping, or so many values
            that they would fill the memory; the message begins with ``source``.
    """
    values = sum(1 for _ in _VALUE.finditer(text))
    if values > _MOST_VALUES:
        raise AdapterFileError(f"{source} holds {values} values, more than any adapter needs")
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except AdapterFileError as error:
        raise AdapterFileError(f"{source} {error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{source} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise AdapterFileError(f"{source} holds {type(content).__name__}, not a mapping")
    if _deeper_than(content, _DEEPEST):
        raise AdapterFileError(f"{source} is nested more than {_DEEPEST} deep")
    return content


def is_number(value: Any) -> bool:
    """Say whether ``value`` is a number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return float("-inf") < value < float("inf") and abs(value) < 1e300


def _deeper_than(content: Any, limit: int) -> bool:
    """Look level by level: comparing or showing what is nested deeply would end the stack."""
    level = [content]
    for _ in range(limit):
        inside = [v for v in level for v in (v.values() if isinstance(v, dict) else v)]
        level = [value for value in inside if isinstance(value, (dict, list))]
        if not level:
            return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = [show(name) for name, count in counts.most_common(5) if count > 1]
        raise AdapterFileError(f"names {', '.join(twice)} twice")
    return found
