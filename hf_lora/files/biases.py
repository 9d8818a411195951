"""Biases in a file: on B, of adapted layers, and of others.

PEFT writes the base's own biases that it has trained, of an adapted layer as one of the layer
inside (``.base_layer.bias``). Before its version 0.6 there was no such name; today's PEFT passes
over those, hf_lora reads both. Whether a bias in a file was trained only the JSON says.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from hf_lora.errors import AdapterFileError, listing
from hf_lora.files.data import LayerTensors
from hf_lora.files.patterns import TailIndex, parents
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import LORA_BIAS
from hf_lora.layers.roles import OWN_BIAS
from hf_lora.text import show

Layers = dict[str, LayerTensors]


def trains_biases(fields: Mapping[str, Any]) -> str | None:
    """Return what a configuration says of the base's biases, None if they do not train."""
    said = fields.get("bias")
    return None if said in (None, "none") else said


def biases_beside(
    others: Iterable[str], fields: Mapping[str, Any], trained: Iterable[str]
) -> list[str]:
    """Return the names among others of biases that trained in modules of no adapted layer.

    Args:
        others: Names of tensors that are no factors.
        fields: The parsed ``adapter_config.json``.
        trained: Names of the modules that are trained in full.
    """
    if trains_biases(fields) != "all":
        return []
    tops = TailIndex(trained)
    found = [name for name in others if name.rpartition(".")[2] == OWN_BIAS]
    return [n for n in found if not any(map(tops.means, parents(n)))]


def with_biases(
    found: Layers, others: Mapping[str, str], fields: Mapping[str, Any], file: TensorFile
) -> tuple[Layers, dict[str, str]]:
    """Return layers that have their own biases beside their factors, and what is left of others.

    Args:
        found: Path of each layer to its tensors.
        others: Name of every other tensor to its key.
        fields: The parsed ``adapter_config.json``.
        file: The file.

    Raises:
        AdapterFileError: The configuration says otherwise of biases on B than the tensors do.
    """
    said = fields.get("lora_bias") or False
    if not isinstance(said, bool):
        raise AdapterFileError(f"{file.path}: lora_bias is {show(said)}, not true or false")
    problems = [
        f"{path or 'the model itself'}: lora_bias is {said}, "
        + ("and it has no bias on B" if said else "and it has one")
        for path, held in found.items()
        if held.layout.beside and (LORA_BIAS in held.shapes) is not said
    ]
    if problems:
        raise AdapterFileError(listing(f"{file.path} contradicts its configuration", problems))
    left = dict(others)
    layers = dict(found)
    for path, held in found.items() if trains_biases(fields) else ():
        key = left.pop(f"{path}.{OWN_BIAS}" if path else OWN_BIAS, None)
        if key is not None:
            layers[path] = dataclasses.replace(
                held,
                keys=held.keys | {OWN_BIAS: key},
                shapes=dict(held.shapes) | {OWN_BIAS: file.shapes[key]},
            )
    return layers, left


def biased_slots(
    slots: Mapping[str, LayerConfig], layers: Mapping[str, LayerTensors]
) -> dict[str, LayerConfig]:
    """Return the numbers of layers, with what their tensors tell of biases."""
    return {
        path: dataclasses.replace(
            slot,
            lora_bias=LORA_BIAS in layers[path].shapes,
            bias=OWN_BIAS in layers[path].shapes,
        )
        for path, slot in slots.items()
    }
