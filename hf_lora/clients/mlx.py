"""Adapters as mlx-lm has them: ``adapters.safetensors`` and ``adapter_config.json``.

Source: mlx-lm 0.32, ``mlx_lm/tuner/utils.py`` (``load_adapters``, ``linear_to_lora_layers``) and
``mlx_lm/tuner/lora.py``: ``y = linear(x) + scale · (x lora_a) lora_b`` with lora_a (I, R) and
lora_b (R, O), one rank and one scale for all layers. What ``keys`` names is looked for in the last
``num_layers`` blocks, where -1 means all of them, and in the whole model; layers that the file has
nothing for keep a lora_b of zeros.
"""

import re
from pathlib import Path

import torch

from hf_lora.clients.source import Source, only_factors
from hf_lora.files.atomic import as_json
from hf_lora.files.data import CONFIG_FILE
from hf_lora.files.safetensors_io import serialize
from hf_lora.kinds.embedding import EMBEDDING
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.planning.clients import common_scaling
from hf_lora.planning.records import some_paths

WEIGHTS = "adapters.safetensors"

# Those whose linear layers have the same names in mlx-lm 0.32 as in transformers 5.24; compared.
_SAME_NAMES = (
    "Cohere2ForCausalLM", "CohereForCausalLM", "Ernie4_5ForCausalLM", "FalconH1ForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM", "GemmaForCausalLM",
    "GlmForCausalLM", "GraniteForCausalLM", "HeliumForCausalLM", "HunYuanDenseV1ForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "NemotronForCausalLM", "Olmo2ForCausalLM",
    "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip
# Those of which this is so in the attention alone: experts and their routers have other names.
_SAME_ATTENTION = (
    "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
)  # fmt: skip
_BLOCK = re.compile(r"(?:.+\.)?layers\.(?P<number>[0-9]+)\.(?P<inside>.+)")
_ATTENTION = "self_attn"


def mlx_faults(source: Source) -> list[str]:
    """Return why mlx-lm cannot use an adapter."""
    faults = only_factors(source, LOW_RANK, EMBEDDING)
    paths = source.of_layout(LOW_RANK, EMBEDDING)
    classes = {*source.classes}
    if classes and classes.isdisjoint((*_SAME_NAMES, *_SAME_ATTENTION)):
        faults.append(
            f"{next(iter(source.classes))} is none of the models whose layers are known to have "
            "the same names there"
        )
    elif classes and classes.isdisjoint(_SAME_NAMES):
        other = [path for path in paths if _ATTENTION not in path.split(".")]
        if other:
            faults.append(f"its experts and routers have other names: {some_paths(other)}")
    ends = [*source.of_layout(EMBEDDING), *(p for p in paths if p.rpartition(".")[2] == "lm_head")]
    if ends and (source.base is None or source.base.tied):
        why = "are one there where" if source.base else "may be one, which base= tells, and then"
        faults.append(
            f"input embeddings and output head {why} they are tied: an update of one would be of "
            f"both, or of neither; here of {some_paths(ends)}"
        )
    return faults


def write_mlx(source: Source, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write an adapter with one rank, filled up with zeros, and one scale, the rest of it in B."""
    slots = source.folder.slots
    r = max(slot.r for slot in slots.values())
    scale = common_scaling(slots.values())
    tensors = {}
    for layer in source.layers():
        made = layer.scaled(scale, dtype).padded(r)
        tensors[f"{layer.path}.lora_a"] = made.a.t()
        tensors[f"{layer.path}.lora_b"] = made.b.t()
    found = {path: _BLOCK.fullmatch(path) for path in slots}
    numbers = [int(block["number"]) for block in found.values() if block]
    blocks = source.base and source.base.count("num_hidden_layers")
    keys = {block["inside"] if block else path for path, block in found.items()}
    fields = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": sorted(keys), "rank": r, "scale": scale},
        "model": source.folder.base,
        "num_layers": blocks - min(numbers) if blocks and numbers else -1,
    }
    with open(folder / WEIGHTS, "wb") as file:
        serialize(tensors, {"format": "pt"})(file)
    (folder / CONFIG_FILE).write_bytes(as_json(fields))
    way = f"mlx_lm.generate --model {source.folder.base or 'BASE'} --adapter-path FOLDER"
    if source.classes:
        return [way]
    return [way, "Its model is not known here (base=), nor whether mlx-lm calls layers the same."]
