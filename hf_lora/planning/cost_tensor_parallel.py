"""What a process keeps and sends under tensor parallelism as transformers does it.

A layer's weight is cut into chunks of ``ceil(width / N)``, so the last process may have less; the
records are of the first. ``layers.tensor_parallel`` says how an adapter's factors follow.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.layers.probe import host_class
from hf_lora.layers.tensor_parallel import SPLIT_WITH
from hf_lora.planning.cost_tensors import Piece, Pieces, ring
from hf_lora.planning.records import PerRank, Plan

_COLUMNS, _ROWS = "colwise", "rowwise"
_GATHERED, _EMBEDDING = "colwise_gather_output", "embedding_rowwise"
_STYLES = {_COLUMNS, _ROWS, _GATHERED, _EMBEDDING}
_CLASSES = {_ROWS: "RowwiseParallel", _COLUMNS: "ColwiseParallel", _GATHERED: "ColwiseParallel"}
"""Those with which adapters are split, to transformers' class."""


def fault(model: nn.Module, plan: Plan, tensors: Pieces, world: int) -> str | None:
    """Return why ``world`` processes cannot share the model so, or why that is not counted."""
    styles = _styles(model)
    if not styles:
        return f"{host_class(model).__name__} has no tp_plan that names a layer of it"
    unknown = {repr(style) for style in {*styles.values()} - _STYLES}
    # a style may also be that of a parameter by itself, as stacked experts have it
    names = [f"{each.path}.{each.name}" for each in tensors.base]
    unknown |= {f"{style!r} of a parameter" for style in _matching(model, names).values()}
    if unknown:
        return f"its tp_plan has styles that are not counted: {', '.join(sorted(unknown))}"
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        return "the base is quantized"
    if plan.trained:
        return f"modules that are trained in full are not counted, here {plan.trained[0].path}"
    if plan.rows:
        return f"rows that are trained are not counted, here of {plan.rows[0].path}"
    try:
        heads = _heads(model)
    except ValueError:  # transformers finds several
        return "its configuration does not say which part of it reads text"
    if heads % world:
        return f"{world} processes cannot share {heads} heads of keys and values equally"
    return None


def tensor_parallel(model: nn.Module, tensors: Pieces, world: int) -> PerRank:
    """Return the record of a model in which ``fault`` finds nothing."""
    styles = _styles(model)
    cuts = [(each, _cut(each, styles.get(each.path))) for each in tensors.learning]
    parts = sum(each.part(world, dim) for each, dim in cuts if dim is not None)
    whole = sum(each.bytes for each, dim in cuts if dim is None)
    adapter = parts + whole
    kept = sum(each.part(world, _cut(each, styles.get(each.path))) for each in tensors.base)
    return PerRank(
        strategy="tensor parallel",
        weights=kept + adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        sent=2 * ring(whole, world),
        sent_in_full=0,
        sent_per_token=sum(_crossing(model, styles, world)),
        sent_to_save=parts * (world - 1),
    )


def _heads(model: nn.Module) -> int:
    """Return how many heads there are to be shared, of keys and values where those are fewer."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # of a model of images and text
        config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0
    return getattr(config, "num_key_value_heads", None) or heads


def _styles(model: nn.Module) -> dict[str, str]:
    """Return path to style of each module that tensor parallelism would split."""
    return _matching(model, (path for path, _ in model.named_modules()))


def _matching(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return those of the names that the model's tp_plan has a style for, with it."""
    said: Any = getattr(model, "tp_plan", None)
    if not isinstance(said, dict):
        return {}
    patterns = {re.escape(name).replace(r"\*", r"\d+"): style for name, style in said.items()}
    found = {}
    for name in names:
        style = next((s for pattern, s in patterns.items() if re.fullmatch(pattern, name)), None)
        if style is not None:
            found[name] = style
    return found


def _cut(tensor: Piece, style: str | None) -> int | None:
    """Return the dimension along which a tensor is cut, or None."""
    if style is None:
        return None
    if tensor.added:
        return SPLIT_WITH.get(_CLASSES.get(style, ""), {}).get(tensor.name)
    if style == _ROWS:  # its bias is added to the sum, once
        return 1 if len(tensor.shape) == 2 else None
    return 0


def _crossing(model: nn.Module, styles: Mapping[str, str], world: int) -> Iterable[int]:
    """Yield the bytes that each split module sends for each token, forward and back."""
    for path, style in styles.items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        wide_out, wide_in = weight.shape
        item = weight.element_size()
        if style == _ROWS:  # its output is a sum over the processes
            yield 2 * ring(wide_out * item, world)
            continue
        # an embedding's output is such a sum too, and the gradient of the others' inputs
        yield 2 * ring(wide_in * item, world)
        if style == _GATHERED:
            yield math.ceil(wide_out / world) * (world - 1) * item
