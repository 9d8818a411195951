"""Trained rows in files: which rows a configuration of PEFT's says they are, and what ours says.

PEFT (0.21) has the rows of a module under one key, and their numbers in its configuration: a list
is for the input embeddings, a mapping names modules by the ends of their paths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_lora.errors import AdapterFileError, listing
from hf_lora.layers.token_rows import TokenRows
from hf_lora.text import show

FIELD = "trainable_token_indices"
"""PEFT's field for the numbers of rows."""

NO_TARGET = "dummy-target-modules"
"""What PEFT wants to be told as the target where only rows are trained."""

_HIGHEST = 2**31
_MOST = 2**20


@dataclasses.dataclass(frozen=True)
class FileRows:
    """The rows of one module in a file."""

    key: str
    ids: tuple[int, ...]


def to_peft(rows: Mapping[str, TokenRows], names: tuple[str, ...]) -> dict[str, list[int]]:
    """Return what PEFT's configuration says of rows, under the names that it reads them by."""
    return {name: list(rows[name].ids) for name in names}


def read_rows(
    fields: Mapping[str, Any],
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    source: str,
) -> tuple[dict[str, FileRows], dict[str, tuple[int, ...]]]:
    """Return the rows of each module, as PEFT understands the configuration.

    Args:
        fields: The parsed ``adapter_config.json``.
        keys: Path of each module that has rows in the file, to their key.
        shapes: Key to shape.
        source: What to name in errors.

    Returns:
        The rows of each of these modules; and each name in the configuration that is none of
        theirs, to its rows: of a module that is tied, perhaps.

    Raises:
        AdapterFileError: The configuration is senseless, or contradicts the tensors.
    """
    said = fields.get(FIELD) or {}
    named = said if isinstance(said, dict) else {"": said}
    problems = [
        f"{FIELD}{f'[{show(name)}]' if name else ''}: {fault}"
        for name, ids in named.items()
        if (fault := _fault(ids))
    ]
    found: dict[str, FileRows] = {}
    used: set[str] = set()
    for path, key in keys.items() if not problems else ():
        name = next((name for name in named if path.endswith(name)), None)
        if name is None:
            problems.append(f"{key}: {FIELD} does not say which rows these are")
            continue
        used.add(name)
        if len(named[name]) != shapes[key][0]:
            problems.append(f"{key} has {shapes[key][0]} rows, and {FIELD} {len(named[name])}")
        found[path] = FileRows(key, tuple(named[name]))
    if isinstance(said, list) and said and not keys:
        problems.append(f"{FIELD} names rows, and the file has none")
    if problems:
        raise AdapterFileError(listing(f"{source} cannot be used", problems))
    return found, {name: tuple(ids) for name, ids in named.items() if name and name not in used}


def to_header(rows: Mapping[str, TokenRows]) -> dict[str, Any]:
    """Return rows as our own header has them."""
    return {
        path: {"ids": list(each.ids)} | ({} if each.of is None else {"of": each.of})
        for path, each in rows.items()
    }


def from_header(content: Any) -> dict[str, TokenRows] | None:
    """Return the rows that a header says, None if it makes no sense."""
    if not isinstance(content, dict):
        return None
    found: dict[str, TokenRows] = {}
    for path, entry in content.items():
        ids, of = (entry.get("ids"), entry.get("of")) if isinstance(entry, dict) else (None, None)
        if _fault(ids) or not isinstance(of, str | None):
            return None
        found[path] = TokenRows(tuple(ids), of)  # type: ignore[arg-type]
    owners = {path: rows.ids for path, rows in found.items() if rows.of is None}
    sound = all(rows.of is None or owners.get(rows.of) == rows.ids for rows in found.values())
    return found if sound else None


def differences(own: Mapping[str, TokenRows], found: Mapping[str, FileRows]) -> list[str]:
    """Return a line for each module of which header and file say different rows."""
    problems = []
    for path in sorted(own.keys() | found.keys()):
        there, here = own.get(path), found.get(path)
        if there is None:
            problems.append(f"rows of {path or 'the model itself'} are not in the header")
        elif here is None and there.of is None:
            problems.append(f"rows of {path or 'the model itself'} have no tensor")
        elif here is not None and here.ids != there.ids:
            problems.append(f"rows of {path or 'the model itself'} have other numbers there")
    return problems


def _fault(ids: Any) -> str | None:
    """Return why something is no list of numbers of rows, or None."""
    if not isinstance(ids, list) or not ids or len(ids) > _MOST:
        return f"{show(ids)} is not a list of rows"
    wrong = [row for row in ids if type(row) is not int or not 0 <= row < _HIGHEST]
    if wrong:
        return f"{show(wrong[0])} is not the number of a row"
    if len(set(ids)) != len(ids):
        return "a row is named twice"
    return None
