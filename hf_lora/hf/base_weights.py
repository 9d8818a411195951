"""Reading a model's base weights for its fingerprint, wrapped, merged or quantized as it may be."""

import torch
from torch import nn

from hf_lora.devices import present
from hf_lora.files.fingerprint import Reader
from hf_lora.layers.hosts import features, has_float_weight
from hf_lora.layers.quantized import float_weight
from hf_lora.model.registry import find


def base_reader(model: nn.Module) -> Reader:
    """Return a function from a layer's path to its base weight and whether that is quantized."""
    found = find(model)
    originals = {id(module): kept for module, kept in found[1].originals} if found else {}

    def read(path: str) -> tuple[torch.Tensor | None, bool]:
        module = model.get_submodule(path)
        kept = originals.get(id(module), {}).get("weight")
        if kept is not None:
            return kept, False
        with present(module):
            weight = float_weight(module)
            whole = weight is not None and _is_whole(module, weight)
            return weight if whole else None, not has_float_weight(module)

    return read


def _is_whole(module: nn.Module, weight: torch.Tensor) -> bool:
    """Say whether all numbers are here: one process may hold a share, or nothing for the moment.

    To read the others' shares, all processes would have to take part; only one may be saving.
    """
    in_features, out_features = features(module) or (0, 0)
    sharded = hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")
    return not sharded and weight.numel() == in_features * out_features
