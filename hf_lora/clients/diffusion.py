"""Adapters of diffusion models: one file as diffusers has it, and one as kohya's scripts have it.

Sources: diffusers 0.42, ``loaders/lora_base.py`` (``_save_lora_weights``: PEFT's keys below the
name of the component, PEFT's configuration as JSON in the header under ``lora_adapter_metadata``)
and ``loaders/lora_conversion_utils.py`` (kohya: ``lora_unet_`` or ``lora_te_`` and the path with
``_`` for ``.``, then ``.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``; updates are scaled
by alpha / r).

Readers that pass over the header take 1 for the scale of a file in diffusers' format. So B has all
of it there, and the header says alpha = r.
"""

import dataclasses
import json
from pathlib import Path

import torch

from hf_lora.clients.source import Source, only_factors
from hf_lora.files.foreign import COMPONENT, METADATA
from hf_lora.files.peft_format import plain_fields
from hf_lora.files.safetensors_io import serialize
from hf_lora.kinds.conv import CONVOLUTION
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.planning.clients import one_alpha, scaling_for

DIFFUSERS = "pytorch_lora_weights.safetensors"
KOHYA = "lora.safetensors"

_UNET, _TEXT = "unet", "text_encoder"
_CLIP = "text_model."
_TEXT_ENCODERS = ("CLIPText", "T5Encoder", "UMT5Encoder", "ChatGLM", "LlamaModel", "Gemma2Model")


def component(source: Source) -> str | None:
    """Return which component of a pipeline an adapter is of; None if that cannot be told."""
    base = source.base
    folder = Path(base.name).name if base is not None else ""
    if COMPONENT.fullmatch(folder):
        return folder
    kinds = _kinds(source)
    if base is not None and "_class_name" in base.fields:
        index = base.fields
        inside = [n for n, said in index.items() if isinstance(said, list) and said[-1] in kinds]
        if inside:
            return inside[0] if len(inside) == 1 else None
    kind = next(iter(kinds), "")
    if kind.startswith(_TEXT_ENCODERS):
        return _TEXT
    if kind.startswith("UNet"):
        return _UNET
    return "transformer" if "Transformer" in kind else None


def diffusers_faults(source: Source) -> list[str]:
    """Return why diffusers cannot use an adapter."""
    return [*_component_faults(source), *only_factors(source, LOW_RANK, CONVOLUTION)]


def kohya_faults(source: Source) -> list[str]:
    """Return why an adapter cannot be written as kohya's scripts do."""
    faults = _component_faults(source)
    found = component(source)
    if found is not None and found != _UNET and not found.startswith(_TEXT):
        faults.append(
            f"a {found} has the names of its authors' code there, which differ from model to model "
            'and fuse layers; client="diffusers" writes what ComfyUI and others read'
        )
    return [*faults, *only_factors(source, LOW_RANK, CONVOLUTION)]


def write_diffusers(source: Source, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write an adapter below the name of its component, all of its scale in B."""
    name = component(source)
    tensors = {}
    for layer in source.layers():
        made = layer.scaled(1.0, dtype)
        path = f"{name}.{_path_in(source, layer.path)}"
        tensors[f"{path}.lora_A.weight"] = made.a
        tensors[f"{path}.lora_B.weight"] = made.b
    slots = source.folder.slots
    even = {p: dataclasses.replace(s, alpha=s.r, rslora=False) for p, s in slots.items()}
    fields = plain_fields(source.folder.fields, even, {p: slot.r for p, slot in slots.items()})
    said = {
        key: fields[key]
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
        if key in fields
    }
    said["target_modules"] = sorted(slots)
    metadata = json.dumps({f"{name}.{k}": v for k, v in said.items()}, indent=2, sort_keys=True)
    with open(folder / DIFFUSERS, "wb") as file:
        serialize(tensors, {"format": "pt", METADATA: metadata})(file)
    return [f"pipeline.load_lora_weights(FOLDER) reads it into the {name}."]


def write_kohya(source: Source, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write an adapter under flattened names, with one alpha, the rest of each scale in B.

    diffusers 0.42 passes over alphas of single layers of an attention.
    """
    name = component(source)
    assert name is not None
    begin, slots = _kohya_prefix(source, name), source.folder.slots
    alpha = one_alpha(slots.values())
    tensors = {}
    for layer in source.layers():
        key = f"{begin}_{_path_in(source, layer.path).replace('.', '_')}"
        made = layer.scaled(scaling_for(alpha, slots[layer.path]), dtype)
        tensors[f"{key}.lora_down.weight"] = made.a
        tensors[f"{key}.lora_up.weight"] = made.b
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    with open(folder / KOHYA, "wb") as file:
        serialize(tensors, {"format": "pt"})(file)
    return [f"{KOHYA} goes where the client has its LoRAs (ComfyUI: models/loras)."]


def _path_in(source: Source, path: str) -> str:
    """Return a layer's path as files have it: transformers 5 took ``text_model.`` off CLIP's."""
    clip = any(kind.startswith("CLIPText") for kind in _kinds(source))
    return f"{_CLIP}{path}" if clip and not path.startswith(_CLIP) else path


def _kohya_prefix(source: Source, name: str) -> str:
    if not name.startswith(_TEXT):
        return "lora_unet"
    fields = {} if source.base is None else source.base.fields
    number = name.removeprefix(_TEXT).strip("_")
    if number or f"{_TEXT}_2" in fields:
        return f"lora_te{number or 1}"
    return "lora_te"


def _kinds(source: Source) -> set[str]:
    """Return the name of the adapter's class, as it says itself."""
    named = source.folder.fields.get("auto_mapping")
    kind = named.get("base_model_class") if isinstance(named, dict) else None
    if isinstance(kind, str):
        return {kind}
    return {*(source.base.classes if source.base is not None else ())}


def _component_faults(source: Source) -> list[str]:
    if component(source) is not None:
        return []
    kinds = ", ".join(sorted(_kinds(source))) or "a model that is not known here"
    return [
        f"which component of a pipeline it is of is not known: it is for {kinds}; name the "
        "component's folder with base=, as .../transformer"
    ]
