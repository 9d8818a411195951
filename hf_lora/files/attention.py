"""Factors of ``nn.MultiheadAttention`` in a file of PEFT's.

PEFT wraps the attention, and in it its last layer, so that the factors of that are found under
``attn.base_layer.out_proj``. What is said of the attention is for both; whatever dropout that is,
PEFT has none there.
"""

import dataclasses
from collections.abc import Mapping

from hf_lora.errors import AdapterFileError
from hf_lora.files.data import LayerTensors
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.reading import OUT, out_slot

_INSIDE = f"base_layer.{OUT}"

Layers = dict[str, LayerTensors]


def with_attention(found: Layers) -> tuple[Layers, dict[str, str]]:
    """Return layers under the model's own names, and the last ones of an attention, to its path."""
    layers: Layers = {}
    outs: dict[str, str] = {}
    for path, held in found.items():
        above = path.removesuffix(_INSIDE).removesuffix(".")
        if path.endswith(_INSIDE) and above in found:
            path = f"{above}.{OUT}" if above else OUT
            outs[path] = above
        layers[path] = held
    return layers, outs


def without_outs(slots: Mapping[str, LayerConfig]) -> dict[str, LayerConfig]:
    """Return the layers of which PEFT's configuration says something."""
    return {
        path: slot
        for path, slot in slots.items()
        if not (path.rpartition(".")[2] == OUT and path.rpartition(".")[0] in slots)
    }


def attention_slots(
    slots: Mapping[str, LayerConfig], layers: Layers, outs: Mapping[str, str], source: str
) -> dict[str, LayerConfig]:
    """Return the numbers of layers, with those of the last layers of an attention.

    Raises:
        AdapterFileError: The two have factors of different ranks.
    """
    found = dict(slots)
    for out, attention in outs.items():
        slot = found[attention] = dataclasses.replace(slots[attention], dropout=0.0)
        if layers[out].rank != slot.r:
            raise AdapterFileError(
                f"{source}: {attention} has rank {slot.r}, and its {OUT} {layers[out].rank}"
            )
        found[out] = out_slot(slot)
    return {path: found[path] for path in layers}
