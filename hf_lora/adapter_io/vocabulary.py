"""Giving a base as many tokens as an adapter's file needs."""

from typing import Any

from torch import nn

from hf_lora.adapter_io.rename import rename
from hf_lora.compat.transformers import is_pretrained
from hf_lora.files.fingerprint import from_json
from hf_lora.files.read import AdapterFolder
from hf_lora.layers.trained import tensor_names


def fit_vocabulary(model: nn.Module, folder: AdapterFolder) -> None:
    """Resize a base's embeddings to those that an adapter brings with it, all rows of them.

    Where rows were added and are in no file the base is left as it is, and the load says so.

    Args:
        model: A base that was just loaded, for this adapter.
        folder: The adapter.
    """
    if not is_pretrained(model):
        return
    ends = [_embedding(model, f"get_{end}_embeddings") for end in ("input", "output")]
    modules = dict(model.named_modules())
    known = modules.keys() | {
        f"{path}.{name}" for path, module in modules.items() for name in tensor_names(module)
    }
    names = rename(folder.factors, folder.others, known, model)
    brought: dict[int, int] = {}
    for name, key in folder.others.items():
        path, _, role = names.tensor(name).rpartition(".")
        module = modules.get(path)
        if module is not None and role == "weight" and any(module is end for end in ends):
            brought[id(module._parameters["weight"])] = folder.file.shapes[key][0]
    needed = {id(end._parameters.get("weight")) for end in ends if end is not None}
    sizes = {*brought.values()}
    if brought.keys() == needed and len(sizes) == 1 and _fingerprint_allows(folder, *sizes):
        model.resize_token_embeddings(*sizes, mean_resizing=False)  # type: ignore[operator]


def _fingerprint_allows(folder: AdapterFolder, size: int) -> bool:
    """Say whether the adapter was trained with this many tokens, as far as it says so."""
    content = (folder.header or {}).get("fingerprint")
    found = from_json(content) if isinstance(content, dict) else None
    return found is None or found.vocabulary in (None, size)


def _embedding(model: Any, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # transformers' word for: this model has none
        return None
    return found if isinstance(found, nn.Module) and "weight" in found._parameters else None
