"""Rows of training data, one at a time, each with words for where it stands."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_lora.errors import ConfigError
from hf_lora.recipes.data import Data, DataSet, Files

Row = tuple[str, dict[str, Any]]
"""Where a row stands, such as ``chat.jsonl line 3``, and its columns."""


def read_rows(source: Files | DataSet, data: Data) -> Iterator[Row]:
    """Yield the rows of a source.

    Raises:
        ConfigError: A file cannot be read or parsed, or ``datasets`` is missing or says no.
    """
    if isinstance(source, DataSet):
        yield from _dataset_rows(source)
        return
    for path in source.paths:
        try:
            if path.suffix == ".parquet":
                yield from _parquet_rows(path)
            elif path.suffix == ".txt":
                yield from _text_rows(path, data)
            else:
                yield from _READERS[path.suffix](path)
        except (OSError, ValueError, csv.Error) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} cannot be read: {error}") from error


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path.name} line {number}"
                yield where, _mapping(_parsed(line, where), where)


def _json_list(path: Path) -> Iterator[Row]:
    content = _parsed(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, list):
        raise ConfigError(f"{path} holds {type(content).__name__}, not a list of rows")
    for number, row in enumerate(content, 1):
        where = f"{path.name} row {number}"
        yield where, _mapping(row, where)


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(f"{where} has another number of columns than the first line")
            yield where, dict(row)


def _text_rows(path: Path, data: Data) -> Iterator[Row]:
    (column,) = (data.columns.get("text", "text"),)
    if data.unit == "file":
        yield path.name, {column: path.read_text(encoding="utf-8").strip()}
        return
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if data.unit == "line" and line.strip():
                yield f"{path.name} line {number}", {column: line.strip()}
            elif data.unit == "paragraph" and line.strip():
                lines.append(line.rstrip())
            elif lines:
                yield f"{path.name}, before line {number}", {column: "\n".join(lines)}
                lines = []
    if lines:
        yield f"{path.name}, at the end", {column: "\n".join(lines)}


def _parquet_rows(path: Path) -> Iterator[Row]:
    rows = _datasets(str(path)).Dataset.from_parquet(str(path))
    for number, row in enumerate(rows, 1):
        yield f"{path.name} row {number}", _whole(row)


def _dataset_rows(source: DataSet) -> Iterator[Row]:
    library = _datasets(source.dataset)
    try:
        rows = library.load_dataset(
            source.dataset, source.name, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise ConfigError(f"The data set {source} cannot be loaded: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{source} row {number}", _whole(row)


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what only other rows of its table have, inside of its columns.

    A table gives every row the fields of all: a tool call the arguments of all tools.
    """
    return {name: _without_nothing(value) for name, value in row.items()}


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nothing(v) for name, v in value.items() if v is not None}
    return [_without_nothing(each) for each in value] if isinstance(value, list) else value


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{what} is read with the library datasets, which is not installed: "
            "pip install datasets"
        ) from error
    return datasets


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is {type(row).__name__}, not a mapping of columns")
    return row


_READERS = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv_rows}
