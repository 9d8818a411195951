"""Is the base in memory the one on the disk that it names? Asked of local files only.

Adapters that were merged for good, added tokens, edited weights and replaced modules are in memory
alone: whoever opens the adapter by the name of its base gets another model.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError
from torch import nn

from hf_lora.adapter_io.base_check import NO_ROWS, Rows, of_tied
from hf_lora.errors import AdapterFileError
from hf_lora.files.fingerprint import Sample, difference, from_json, positions, without_rows
from hf_lora.files.safetensors_io import TensorFile

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MOST_NAMES = 20


def base_changes(
    model: nn.Module,
    name: str | None,
    fingerprint: Mapping[str, Any],
    merged: tuple[str, ...],
    rows: Rows = NO_ROWS,
) -> dict[str, Any]:
    """Return in what a base is known to differ from the one that it names; empty if in nothing.

    Compared are tensors that the files have under the same name; what a conversion of names or a
    quantizer hides is not known.

    Args:
        model: The model.
        name: Folder or Hub id of its base.
        fingerprint: That of the base in memory, as the header holds it.
        merged: Names of the adapters that were merged into it for good.
        rows: What the adapter has rows of, and the fingerprint not.

    Returns:
        ``merged``, the names; ``tensors``, those that are others, and ``more``, how many besides;
        ``tokens``, how many the files have and the model has, where rows that were added are no
        part of the adapter.
    """
    found: dict[str, Any] = {"merged": list(merged)} if merged else {}
    then = from_json(fingerprint)
    files = _files(model, name)
    if then is None or not files:
        return found
    changed, tokens, own = [], None, of_tied(rows, then.ties)
    for key, sample in then.samples.items():
        file = next((files[each] for each in _names(key, model) if each in files), None)
        known = next((each for each in _names(key, model) if each in files), None)
        if file is None or known is None or not file.dtypes[known].is_floating_point:
            continue
        shape = file.shapes[known]
        if shape != sample.shape:
            vocabulary = (then.vocabulary,) == sample.shape[:1] and shape[1:] == sample.shape[1:]
            added = range(shape[0], sample.shape[0]) if vocabulary else ()
            if vocabulary and not {*added} <= {*own.get(key, ())}:
                tokens = [shape[0], then.vocabulary]
            changed += [] if vocabulary else [key]
        elif _differs(file, known, sample, own.get(key, ())):
            changed.append(key)
    if changed:
        found["tensors"] = changed[:_MOST_NAMES]
        found["more"] = len(changed) - len(found["tensors"])
    if tokens:
        found["tokens"] = tokens
    return found


def describe_changes(changes: Mapping[str, Any]) -> list[str]:
    """Return :func:`base_changes` as lines to read; a stranger may have written them."""
    lines = []
    merged, tensors, tokens = (changes.get(key) for key in ("merged", "tensors", "tokens"))
    if isinstance(merged, list) and merged:
        lines.append(f"adapters were merged into it for good: {', '.join(map(str, merged))}")
    if isinstance(tokens, list) and len(tokens) == 2:
        lines.append(
            f"tokens were added ({tokens[0]} on the disk, {tokens[1]} in memory), and their rows "
            "are frozen and in no file"
        )
    if isinstance(tensors, list) and tensors:
        more = changes.get("more")
        others = f" and {more} more" if more else ""
        lines.append(f"other weights: {', '.join(map(str, tensors))}{others}")
    return lines


def _differs(file: TensorFile, name: str, sample: Sample, rows: Collection[int]) -> bool:
    if sample.values is None or file.dtypes[name].itemsize < 2:
        return False
    there = without_rows(file.pick(name, positions(sample.shape)), sample.shape, rows)
    return difference(there, sample.values, sample.quantized) is not None


def _names(name: str, model: nn.Module) -> tuple[str, ...]:
    """Return what a tensor may be called in the files: they may be those of the backbone alone."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), f"{prefix}{name}"


def _files(model: nn.Module, name: str | None) -> dict[str, TensorFile]:
    """Return each tensor's name to the local file that it is in; empty if there are none."""
    if name is None:
        return {}
    try:
        index = _local(model, name, _INDEX)
        if index is not None:
            mapped = json.loads(index.read_text())["weight_map"]
            parts = {part: _local(model, name, part) for part in set(mapped.values())}
        else:
            parts = {_WEIGHTS: _local(model, name, _WEIGHTS)}
        opened = [TensorFile(path) for path in parts.values() if path is not None]
    except (OSError, ValueError, KeyError, AttributeError, AdapterFileError, HFValidationError):
        return {}  # not ours to judge: whoever loads the base is told what is wrong with it
    return {tensor: file for file in opened for tensor in file.shapes}


def _local(model: nn.Module, name: str, file: str) -> Path | None:
    if os.path.isdir(name):
        path = Path(name, file)
        return path if path.is_file() else None
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    found = try_to_load_from_cache(name, file, revision=commit)
    return Path(found) if isinstance(found, str) else None
