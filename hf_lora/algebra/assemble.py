"""A whole adapter from layers that were computed, and from what stands beside them in the files."""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_lora.adapter_io.tensors import key_of
from hf_lora.algebra.beside import Beside, place_inside
from hf_lora.algebra.sources import Adapter
from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError
from hf_lora.files.attention import without_outs
from hf_lora.files.biases import trains_biases
from hf_lora.files.data import AdapterData
from hf_lora.files.header import BASE_CHANGED
from hf_lora.files.labels import LABELS
from hf_lora.files.patterns import SPECIAL, TailIndex
from hf_lora.files.peft_format import weights_named
from hf_lora.kinds.experts import part_roles, peft_key
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import LORA_A, LORA_B, LORA_BIAS
from hf_lora.layers.roles import Layout
from hf_lora.text import some

_ON_B = "lora_B.bias"
_UNSAID = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields of PEFT's that limit what the names in ``target_modules`` mean."""


def keys_of(
    path: str, layout: Layout, config: LayerConfig, adapted: Collection[str]
) -> dict[str, str]:
    """Return role to key in PEFT's notation of a layer's low-rank tensors.

    Args:
        path: The layer's.
        layout: How files hold its tensors.
        config: Its numbers.
        adapted: Paths of all layers of the adapter.
    """
    if config.parts:
        found = {}
        for i, role in enumerate(layout.roles):
            part = next((part for part in config.parts if role in part_roles(part)), None)
            if part is not None:
                factor = (LORA_A, LORA_B)[i % 2]
                found[role] = key_of(path, peft_key(config.parts, part, factor))
        return found
    inside = place_inside(path, adapted)
    found = {role: key_of(path, inside + layout.key(role)) for role in layout.roles}
    if config.lora_bias:
        found[LORA_BIAS] = key_of(path, inside + _ON_B)
    return found


def assembled(
    adapters: Sequence[Adapter],
    slots: Mapping[str, LayerConfig],
    tensors: dict[str, torch.Tensor],
    held: Beside,
) -> AdapterData:
    """Return all that is written for an adapter that was made of others.

    Args:
        adapters: What it was made of.
        slots: Path of each layer to its numbers.
        tensors: Key in PEFT's notation to low-rank tensor.
        held: What it has in full.
    """
    folders = [adapter.folder for adapter in adapters]
    based = next((f for f in folders if (f.header or {}).get("fingerprint")), None)
    based = based or next((f for f in folders if f.base), folders[0])
    header = based.header or {}
    tasks = {folder.fields.get("task_type") for folder in folders}
    mapped = [folder.fields.get("auto_mapping") for folder in folders]
    by_weight = [path for path in slots if any(_by_weight(f.fields, path) for f in folders)]
    stacked = [path for path, slot in slots.items() if slot.parts]
    fingerprint = header.get("fingerprint")
    return AdapterData(
        config=_config(adapters, slots, held),
        slots=dict(sorted(slots.items())),
        trained=held.trained,
        tensors=tensors | held.tensors,
        target_names=_target_names(adapters, without_outs(slots).keys() - {*by_weight, *stacked}),
        by_weight=by_weight,
        trained_names=held.trained_names,
        base=based.base,
        revision=based.revision,
        task=tasks.pop() if len(tasks) == 1 else None,
        auto_mapping=mapped[0] if all(each == mapped[0] for each in mapped) else None,
        fan_in_fan_out=any(bool(folder.fields.get("fan_in_fan_out")) for folder in folders),
        fingerprint=fingerprint if isinstance(fingerprint, dict) else None,
        buffers=held.buffers,
        base_changed=header.get(BASE_CHANGED) or {},
        labels=(folders[0].header or {}).get(LABELS),
        ties=held.ties,
        rows=held.rows,
        row_names=held.row_names,
        pefts_tie=folders[0].ties_embeddings,
    )


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ConfigError if numbers are not finite in the type that they have."""
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ConfigError(
            f"The result has numbers that its type cannot hold: {some(bad)}. Ask for another "
            "dtype, such as 'float32' or 'bfloat16', or for smaller weights."
        )


def pattern_of(path: str) -> str:
    """Return the pattern that means the module at a path; the model itself has no name."""
    return SPECIAL.sub(r"\\\g<0>", path).replace(".", r"\.") or "(?:)"


def _by_weight(fields: Mapping[str, Any], path: str) -> bool:
    return TailIndex(weights_named(fields, "")).means(f"{path}.weight")


def _target_names(adapters: Sequence[Adapter], paths: Iterable[str]) -> list[str] | str:
    """Return what means these layers and no others of the model, which nobody has seen here.

    Names mean together what they mean alone. If there are not only names, a pattern of whole paths
    always works.
    """
    names: set[str] = set()
    for adapter in adapters:
        fields = adapter.folder.fields
        said = fields.get("target_modules")
        if not isinstance(said, list) or any(fields.get(name) for name in _UNSAID):
            return "|".join(pattern_of(path) for path in sorted(paths))
        names |= {*map(str, said)}
    return sorted(names)


def _config(
    adapters: Sequence[Adapter], slots: Mapping[str, LayerConfig], held: Beside
) -> LoRAConfig:
    """Return the configuration that the result amounts to."""
    said = without_outs(slots)
    stacks = [f"{path}.{part}" for path, slot in said.items() for part in slot.parts]
    layers = [path for path, slot in said.items() if not slot.parts]
    r, alpha = _most_common((slot.r, slot.alpha) for slot in said.values()) if said else (8, 8.0)
    dropout = _most_common(slot.dropout for slot in slots.values()) if slots else 0.0
    numbers = {
        "r": r,
        "alpha": alpha,
        "dropout": dropout,
        "rslora": any(slot.rslora for slot in slots.values()),
        "lora_bias": any(slot.lora_bias for slot in slots.values()),
        "overrides": {
            pattern_of(path): {"r": slot.r, "alpha": slot.alpha}
            for path, slot in said.items()
            if (slot.r, slot.alpha) != (r, alpha)
        },
    }
    own = [adapter.folder.config for adapter in adapters]
    first = own[0]
    if first is not None and all(
        adapter.folder.config == first and adapter.folder.slots == dict(slots)
        for adapter in adapters
    ):
        return first
    if first is not None and all(
        each is not None and (each.targets, each.exclude) == (first.targets, first.exclude)
        for each in own
    ):
        return dataclasses.replace(first, **numbers)
    return LoRAConfig(
        targets=[*map(pattern_of, layers), *map(pattern_of, stacks)],
        bias=trains_biases(adapters[0].folder.fields) or "none",
        train=[pattern_of(path) for path in held.trained],
        train_rows={pattern_of(p): rows.ids for p, rows in held.rows.items() if rows.of is None},
        **numbers,
    )


def _most_common(values: Iterable[Any]) -> Any:
    counts = collections.Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
