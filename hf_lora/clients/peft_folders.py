"""Adapter folders for PEFT as it was years ago, and for vLLM.

PEFT up to 0.8 stops at the first field of ``adapter_config.json`` that it does not know, and up to
0.6 knows no rank-stabilized scaling. vLLM 0.32 has memory for adapters of some ranks only
(``vllm/config/lora.py``, ``MaxLoRARanks``) and reads ``rank_pattern`` and ``alpha_pattern``.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from hf_lora.clients.source import Source
from hf_lora.files.atomic import as_json
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.peft_format import plain_fields
from hf_lora.files.safetensors_io import serialize
from hf_lora.planning.clients import vllm_rank, vllm_reasons


def peft_faults(source: Source) -> list[str]:
    """Return nothing: what was read is of its format."""
    return []


def vllm_faults(source: Source) -> list[str]:
    """Return why vLLM cannot serve an adapter."""
    facts = source.facts
    return vllm_reasons(
        source.classes,
        facts.slots,
        facts.trained,
        not_linear=facts.not_linear,
        buffers=facts.buffers,
        biases=facts.biases,
        rows=facts.rows,
    )


def write_peft(source: Source, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write an adapter as it is, with a configuration that old readers understand."""
    tensors = dict(_read(source))
    ranks = {path: slot.r for path, slot in source.folder.slots.items()}
    _write(source, folder, tensors, ranks, dtype)
    return ["PeftModel.from_pretrained(model, FOLDER) reads it."]


def write_vllm(source: Source, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write an adapter with one rank for all layers, of those that vLLM has memory for."""
    slots = source.folder.slots
    r = vllm_rank(slots)
    tensors = dict(_read(source))
    for factors in source.layers():
        keys = source.folder.factors[factors.path].keys
        padded = factors.padded(r)
        tensors |= zip(keys.values(), (padded.a, padded.b), strict=True)
    _write(source, folder, tensors, dict.fromkeys(slots, r), dtype)
    ranks = sorted({slot.r for slot in slots.values()} - {r})
    filled = (
        f"Ranks {', '.join(map(str, ranks))} were filled up with zeros to {r}." if ranks else ""
    )
    return [*filter(None, [filled]), f"Start vLLM with --enable-lora --max-lora-rank {r} or more."]


def _read(source: Source) -> list[tuple[str, torch.Tensor]]:
    """Return all tensors that are read, under the names that they have in the file."""
    folder = source.folder
    keys = [key for held in folder.factors.values() for key in held.keys.values()]
    keys += [*folder.others.values(), *(rows.key for rows in folder.rows.values())]
    return list(folder.file.read(keys))


def _write(
    source: Source,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    ranks: Mapping[str, int],
    dtype: torch.dtype | None,
) -> None:
    fields = plain_fields(source.folder.fields, source.folder.slots, ranks)
    cast = {
        key: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }
    with open(folder / WEIGHTS_FILE, "wb") as file:
        serialize(cast, {"format": "pt"})(file)
    (folder / CONFIG_FILE).write_bytes(as_json(fields))
