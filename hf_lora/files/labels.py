"""The labels of a classifier, kept in an adapter's header: how many, and what they are called."""

from collections.abc import Iterable, Mapping
from typing import Any

from hf_lora.errors import AdapterFileError
from hf_lora.text import show

LABELS = "labels"
"""The entry of the header: ``id2label``, and ``problem_type`` where the model has one."""

_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def has_a_row_each(count: int, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Say whether one of the tensors has a row for each label; detectors have one more, for none.

    Args:
        count: The number of labels.
        shapes: Of the tensors of modules that were trained in full.
    """
    return any(shape and shape[0] in (count, count + 1) for shape in shapes)


def read_labels(
    raw: Mapping[str, Any], shapes: Iterable[tuple[int, ...]], source: str
) -> dict[str, Any]:
    """Return what a header says of labels, as arguments of a configuration; empty if nothing.

    Args:
        raw: The parsed header; a stranger may have written it.
        shapes: Of the tensors in the file that are no factors.
        source: What to name in errors.

    Raises:
        AdapterFileError: No labels, or not as many as the head in the file has rows.
    """
    entry = raw.get(LABELS)
    if entry is None:
        return {}
    names = entry.get("id2label") if isinstance(entry, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise AdapterFileError(f"{source}: {LABELS} is {show(entry)}, not the names of labels")
    if names.keys() != {str(number) for number in range(len(names))}:
        raise AdapterFileError(f"{source}: {LABELS} does not number its labels from 0")
    if not has_a_row_each(len(names), shapes):
        raise AdapterFileError(f"{source}: {LABELS} has {len(names)} names, and no head such rows")
    id2label = {int(number): name for number, name in names.items()}
    found = {"id2label": id2label, "label2id": {name: n for n, name in id2label.items()}}
    problem = entry.get("problem_type")
    return {**found, "problem_type": problem} if problem in _PROBLEMS else found
