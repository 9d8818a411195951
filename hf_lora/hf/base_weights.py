"""Reading a model's base weights for its fingerprint, wrapped, merged or quantized as it may be."""

import torch
from torch import nn

from hf_lora.devices import present
from hf_lora.files.fingerprint import Reader
from hf_lora.layers.hosts import features, has_float_weight
from hf_lora.layers.quantized import float_weight
from hf_lora.model.registry import find
from hf_lora.partitions import numel_of
from hf_lora.sharding import in_parts


def base_reader(model: nn.Module, *, together: bool = False) -> Reader:
    """Return a function from a layer's path to its base weight and whether that is quantized.

    Args:
        model: The model.
        together: Whether every process takes part, so that weights which are spread can be read.
    """
    found = find(model)
    originals = {id(each.module): each for each in found[1].originals} if found else {}

    def read(path: str) -> tuple[torch.Tensor | None, bool]:
        module = model.get_submodule(path)
        original = originals.get(id(module))
        kept = None if original is None else original.read("weight")
        if kept is not None:
            return kept, False
        with present(module):
            weight = float_weight(module)
            there = weight is not None and _is_there(module, weight, together)
            return weight if there else None, not has_float_weight(module)

    return read


def _is_there(module: nn.Module, weight: torch.Tensor, together: bool) -> bool:
    """Say whether all numbers can be read: one process may hold a share, or nothing for the moment.

    To read the others' shares, all processes have to take part; only one may be saving.
    """
    in_features, out_features = features(module) or (0, 0)
    alone = in_parts(weight) and not together
    return not alone and numel_of(weight) == in_features * out_features
