"""A picture of how much an adapter changes each layer, blocks from left to right."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError

from hf_lora.adapter_io.match import match_folder
from hf_lora.errors import HfLoRAError
from hf_lora.file_merging.base import CheckpointBase, model_without_data
from hf_lora.file_merging.checkpoint import CONFIG, Checkpoint
from hf_lora.files.read import AdapterFolder
from hf_lora.kinds.table import layer_class

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_BESIDE = "-"
"""The column of what is in no block."""


def base_norms(folder: AdapterFolder, base: str | os.PathLike[str] | None) -> dict[str, float]:
    """Return the Frobenius norm of the weight under each layer of an adapter; empty if not here.

    One tensor is in memory at a time. Of a base on the Hub what the cache has is read, and nothing
    is fetched.

    Args:
        folder: The adapter.
        base: Folder or id of its base; None for the one that it names.
    """
    found = _on_disk(folder.base if base is None else base, folder.revision)
    if found is None:
        return {}
    try:
        checkpoint = Checkpoint(found)
        model = model_without_data(checkpoint, folder)
        stored = CheckpointBase(model, checkpoint)
        match = match_folder(folder, model, check_base=False, base=stored)
    except HfLoRAError:
        return {}
    names = {id(module): path for path, module in model.named_modules()}
    norms = {}
    for path, held in zip(match.slots, folder.factors, strict=True):
        module = model.get_submodule(path)
        kind = layer_class(module)
        squares = 0.0
        for role in kind.lora_parts(module) or kind.lora_weights:
            weight = stored.read(f"{names[id(module)]}.{role}")
            if weight is not None:
                rows = torch.linalg.vector_norm(weight.float().flatten(1), dim=1)
                squares += float(rows.double().square().sum())
        if squares:
            norms[held] = math.sqrt(squares)
    return norms


def _on_disk(base: str | os.PathLike[str] | None, revision: str | None) -> Path | None:
    if base is None:
        return None
    if isinstance(base, os.PathLike) or os.path.exists(base):
        return Path(base)
    try:
        config = try_to_load_from_cache(base, CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def grid(values: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float]]]:
    """Return modules, blocks, and a number for each of them, nan where there is none.

    Args:
        values: Path of each layer to its number.
    """
    places = {}
    for path in values:
        found = _BLOCK.search(path)
        block = found[1] if found else _BESIDE
        module = path if found is None else f"{path[: found.start(1)]}*{path[found.end(1) :]}"
        places[path] = module, block
    rows = list(dict.fromkeys(module for module, _ in places.values()))
    numbered = {block for _, block in places.values()} - {_BESIDE}
    beside = [_BESIDE] * any(block == _BESIDE for _, block in places.values())
    columns = [*beside, *sorted(numbered, key=int)]
    table = [[math.nan] * len(columns) for _ in rows]
    for path, value in values.items():
        module, block = places[path]
        table[rows.index(module)][columns.index(block)] = value
    return rows, columns, table


def draw(values: Mapping[str, float], what: str, path: str | os.PathLike[str]) -> None:
    """Draw a number for each layer into a picture: a row for each module, a column for each block.

    Needs matplotlib.

    Args:
        values: Path of each layer to its number.
        what: What the numbers are.
        path: The picture; its ending says of which kind.
    """
    from matplotlib.figure import Figure

    rows, columns, table = grid(values)
    size = (max(4.0, 2.5 + 0.3 * len(columns)), max(2.0, 1.2 + 0.3 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    step = max(1, len(columns) // 16)
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=7)
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes, label=what)
    figure.savefig(path, dpi=120)
