"""Adapters in the file format of diffusers' pipelines, out of a wrapped model and into one.

A file holds the factors of several components, each under its name, and PEFT's configuration of
each in its header under ``lora_adapter_metadata``. Seen in diffusers 0.42, ``loaders``.
"""

import collections
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.load import load_folder
from hf_lora.adapter_io.save import collect
from hf_lora.compat.diffusers import METADATA
from hf_lora.errors import AdapterFileError, SaveError, listing
from hf_lora.files.atomic import as_json
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.keys import PREFIX
from hf_lora.files.peft_format import to_peft
from hf_lora.files.safetensors_io import serialize
from hf_lora.model.choices import activate
from hf_lora.model.registry import wrapped
from hf_lora.model.transaction import Transaction

FILE = "pytorch_lora_weights.safetensors"

FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")
_ALPHA = ".alpha"
_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")
"""What decides the mathematics; the layers follow from the tensors."""


def of_model(model: nn.Module, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an adapter's tensors under diffusers' names, and PEFT's configuration of it.

    Raises:
        SaveError: It has more than factors, for which diffusers has no names.
    """
    model, registry = wrapped(model)
    registry.settle_buffers()
    data = collect(model, registry, name, None)
    others = sorted(key for key in data.tensors if not key.endswith(FACTORS))
    if others:
        raise SaveError(
            listing(f"diffusers' files hold low-rank factors; adapter {name!r} also has", others)
        )
    fields = to_peft(data)
    said = {field: fields[field] for field in _FIELDS if field in fields}
    names = fields["target_modules"]
    said["target_modules"] = names if isinstance(names, str) else list(names)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in data.tensors.items()}
    return tensors, said


def write(model: nn.Module, file: Path, name: str) -> None:
    """Write an adapter of one model, without the name of a component."""
    tensors, said = of_model(model, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        serialize(tensors, {"format": "pt", METADATA: json.dumps(said, sort_keys=True)})(stream)


def attach(
    model: nn.Module,
    tensors: Mapping[str, Any],
    fields: Mapping[str, Any] | None,
    name: str,
    *,
    replace: bool = False,
) -> None:
    """Attach factors to a wrapped model as an adapter, and use it alone.

    Args:
        model: The model.
        tensors: Factors under PEFT's names, without a prefix, and alphas beside them.
        fields: PEFT's configuration, if there is one. Without it a layer's alpha is the one that
            stands beside its factors, or its rank.
        name: The adapter's.
        replace: Whether it takes the place of one of that name.

    Raises:
        AdapterFileError: There are other tensors than factors.
        AdapterMismatchError, UnsupportedAdapterError, StateError: As for :func:`hf_lora.load`.
    """
    alphas = {k.removesuffix(_ALPHA): v for k, v in tensors.items() if k.endswith(_ALPHA)}
    factors = {key: value for key, value in tensors.items() if not key.endswith(_ALPHA)}
    strange = sorted(key for key in factors if not key.endswith(FACTORS))
    if strange or not factors:
        raise AdapterFileError(
            listing("This is no LoRA as diffusers writes one; it holds", strange or ["nothing"])
        )
    if fields is None:
        fields = _numbers(factors, alphas)
    said = {
        "peft_type": "LORA",
        **{k: list(v) if isinstance(v, set) else v for k, v in fields.items()},
    }
    with tempfile.TemporaryDirectory(prefix="hf_lora-") as folder:
        place = Path(folder)
        kept = {f"{PREFIX}{key}": value.detach().cpu() for key, value in factors.items()}
        with (place / WEIGHTS_FILE).open("wb") as stream:
            serialize(kept, {"format": "pt"})(stream)
        (place / CONFIG_FILE).write_bytes(as_json(said))
        with Transaction(model) as change:
            load_folder(
                model,
                place,
                change,
                adapter=name,
                trainable=False,
                check_base=True,
                replace=replace,
            )
            activate(model, name)
            change.commit()


def _numbers(factors: Mapping[str, Any], alphas: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration for what stands beside factors."""
    ends = ".lora_B.weight"
    ranks = {key.removesuffix(ends): len(v[0]) for key, v in factors.items() if key.endswith(ends)}
    each = {path: float(alphas.get(path, rank)) for path, rank in ranks.items()}
    [(r, _)] = collections.Counter(ranks.values()).most_common(1)
    return {
        "r": r,
        "lora_alpha": r,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{path}": rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{path}": alpha for path, alpha in each.items() if alpha != r},
    }
