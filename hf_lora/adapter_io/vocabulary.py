"""Giving a base as many tokens as an adapter's file needs, and the rows that the file has of them.

PEFT writes the embeddings of a base to which tokens were added into the adapter's file, trained or
not (``save_embedding_layers``). What is not trained is the base's: the rows that the file has more
than the checkpoint are put into the base, and all others must be the same.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.rename import Renaming, rename
from hf_lora.compat.transformers import is_pretrained
from hf_lora.files.fingerprint import from_json
from hf_lora.files.patterns import endings
from hf_lora.files.read import AdapterFolder
from hf_lora.layers.trained import tensor_names


def fit_vocabulary(model: nn.Module, folder: AdapterFolder) -> None:
    """Resize a base's embeddings to those that an adapter brings with it, all rows of them.

    Added rows that the file has of the base itself are put there. Where rows were added and are in
    no file the base is left as it is, and the load says so.

    Args:
        model: A base that was just loaded, for this adapter.
        folder: The adapter.
    """
    if not is_pretrained(model):
        return
    getters = (f"get_{end}_embeddings" for end in ("input", "output"))
    ends = [end for getter in getters if (end := embedding(model, getter)) is not None]
    modules = dict(model.named_modules())
    known = modules.keys() | {
        f"{path}.{name}" for path, module in modules.items() for name in tensor_names(module)
    }
    names = rename(folder.factors, folder.others, known, model)
    brought = dict(_of_embeddings(folder.others, names, modules, ends))
    weights = {full: key for full, key in brought.items() if full.endswith(".weight")}
    sizes = {folder.file.shapes[key][:1] for key in weights.values()}
    there = {id(model.get_parameter(full)) for full in weights}
    if there != {id(end._parameters["weight"]) for end in ends} or len(sizes) != 1:
        return
    size = sizes.pop()
    if not size or not _fingerprint_allows(folder, *size):
        return
    own = {name: key for name, key in folder.others.items() if not _is_trained(name, folder)}
    rows = dict(_of_embeddings(own | folder.originals, names, modules, ends))
    before = {full: len(model.get_parameter(full)) for full in rows}
    model.resize_token_embeddings(*size, mean_resizing=False)  # type: ignore[operator]
    for full, key in rows.items():  # by name: a head is another module now
        ((_, tensor),) = folder.file.read([key])
        _fill(model.get_parameter(full), tensor, before[full])


def _of_embeddings(
    held: Mapping[str, str],
    names: Renaming,
    modules: Mapping[str, nn.Module],
    ends: Collection[nn.Module],
) -> Iterator[tuple[str, str]]:
    """Yield a parameter's name in the model and its key for what a file has of embeddings."""
    for name, key in held.items():
        full = names.tensor(name)
        path, _, role = full.rpartition(".")
        end = next((end for end in ends if end is modules.get(path)), None)
        if end is not None and end._parameters.get(role) is not None:
            yield full, key


def _is_trained(name: str, folder: AdapterFolder) -> bool:
    """Say whether a tensor is the adapter's own, and not what the base has there."""
    return folder.own is not None or bool(
        endings(name.rpartition(".")[0], folder.trained_names) or name in folder.originals
    )


@torch.no_grad()
def _fill(parameter: nn.Parameter, rows: torch.Tensor, first: int) -> None:
    """Put the rows from ``first`` on, which were added, into a parameter of the base."""
    if parameter.shape == rows.shape:
        parameter[first:] = rows[first:].to(parameter.device, parameter.dtype)


def _fingerprint_allows(folder: AdapterFolder, size: int) -> bool:
    """Say whether the adapter was trained with this many tokens, as far as it says so."""
    content = (folder.header or {}).get("fingerprint")
    found = from_json(content) if isinstance(content, dict) else None
    return found is None or found.vocabulary in (None, size)


def embedding(model: Any, getter: str) -> nn.Module | None:
    """Return what a method of a model gives as its embeddings, if it has such."""
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # transformers' word for: this model has none
        return None
    return found if isinstance(found, nn.Module) and "weight" in found._parameters else None
