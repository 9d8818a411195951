"""Who else can use an adapter, and why not: vLLM as it is saved, llama.cpp as it is exported.

What they do was seen with vLLM 0.32 and llama.cpp's converter and runtime of November 2026; which
architectures vLLM gives adapters to is its own list.
"""

import collections
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from hf_lora.layers.layer_config import LayerConfig

# vLLM has memory for these ranks only, and refuses others as --max-lora-rank.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_HEADS = ("classifier", "score")
_TEXT = (
    "Cohere2ForCausalLM", "Cohere2MoeForCausalLM", "CohereForCausalLM", "CwmForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM",
    "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconH1ForCausalLM",
    "GPTBigCodeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM",
    "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM",
    "GlmForCausalLM", "GlmMoeDsaForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM",
    "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM",
    "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM", "LlamaForCausalLM", "LongcatFlashForCausalLM", "MiniMaxM2ForCausalLM",
    "MistralForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM", "NemotronHForCausalLM",
    "OPTForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM",
    "OlmoHybridForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
    "SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM", "VaultGemmaForCausalLM",
)  # fmt: skip
_WITH_A_LANGUAGE_MODEL = (
    "AudioFlamingo3ForConditionalGeneration", "Blip2ForConditionalGeneration",
    "Emu3ForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration", "Glm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration", "GlmOcrForConditionalGeneration",
    "GraniteSpeechForConditionalGeneration", "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration", "Lfm2VlForConditionalGeneration",
    "LightOnOcrForConditionalGeneration", "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration", "Mistral3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration", "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration", "SmolVLMForConditionalGeneration",
)  # fmt: skip
_LANGUAGE_MODEL = ("language_model", "text_model", "lm_head")


class Architecture(NamedTuple):
    """What llama.cpp calls a model's class, and what its converter does to its weights."""

    name: str
    """``general.architecture``."""

    halves: bool = False
    """Whether rows of q and k are put into its order of the rotary halves."""

    mixed: bool = False
    """Whether rows of a fused q, k and v stand head by head and are put one after the other."""


# Those whose linear layers the converter keeps as a whole; all were compared with its own output.
LLAMA_CPP: Mapping[str, Architecture] = {
    "Cohere2ForCausalLM": Architecture("cohere2"),
    "CohereForCausalLM": Architecture("command-r"),
    "Exaone4ForCausalLM": Architecture("exaone4"),
    "GPT2LMHeadModel": Architecture("gpt2"),
    "GPTNeoXForCausalLM": Architecture("gptneox", mixed=True),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "Gemma3ForConditionalGeneration": Architecture("gemma3"),
    "GemmaForCausalLM": Architecture("gemma"),
    "Glm4ForCausalLM": Architecture("glm4"),
    "GraniteForCausalLM": Architecture("granite", halves=True),
    "LlamaForCausalLM": Architecture("llama", halves=True),
    "MistralForCausalLM": Architecture("llama", halves=True),
    "MixtralForCausalLM": Architecture("llama", halves=True),
    "NemotronForCausalLM": Architecture("nemotron"),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "OlmoForCausalLM": Architecture("olmo", halves=True),
    "Phi3ForCausalLM": Architecture("phi3"),
    "PhiForCausalLM": Architecture("phi2"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "SeedOssForCausalLM": Architecture("seed_oss"),
    "SmolLM3ForCausalLM": Architecture("smollm3", halves=True),
    "StableLmForCausalLM": Architecture("stablelm"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
}


def vllm_reasons(
    classes: Collection[str],
    slots: Mapping[str, LayerConfig],
    trained: Iterable[str],
    *,
    not_linear: Collection[str] = (),
    buffers: Collection[str] = (),
    biases: Collection[str] = (),
    rows: Collection[str] = (),
) -> list[str]:
    """Return why vLLM cannot serve an adapter; nothing if it can.

    Args:
        classes: Name of the model's class and of those that it is derived from; nothing if it is
            not known, and then not asked for.
        slots: Path of each adapted layer to its numbers.
        trained: Paths or names of the modules that are trained in full.
        not_linear: Those of the layers that are convolutions or embeddings.
        buffers: Names of buffers of the base that the training has moved.
        biases: Paths of other modules whose bias is trained.
        rows: Paths of the modules of which some rows are trained.
    """
    reasons = [] if slots else ["there is no adapted layer"]
    heads = {name.removesuffix("ForSequenceClassification") + "ForCausalLM" for name in classes}
    vision = not {*classes}.isdisjoint(_WITH_A_LANGUAGE_MODEL)
    if classes and not vision and {*classes, *heads}.isdisjoint(_TEXT):
        reasons.append(f"{_first(classes)} is none of the architectures that it gives adapters to")
    outside = [p for p in slots if {*p.split(".")}.isdisjoint(_LANGUAGE_MODEL)] if vision else []
    if outside:
        reasons.append(
            f"it adapts the language model, and other parts by an experimental switch only, here "
            f"{_some(outside)}"
        )
    if not_linear:
        reasons.append(f"it adapts linear layers only, here also {_some(not_linear)}")
    highest = max((slot.r for slot in slots.values()), default=0)
    if highest > _VLLM_RANKS[-1]:
        reasons.append(f"its highest rank is {_VLLM_RANKS[-1]}, here {highest}")
    refused = [path for path in trained if path.rsplit(".", 1)[-1] not in _VLLM_HEADS]
    if refused:
        reasons.append(f"it refuses modules trained in full, here {_some(refused)}")
    if buffers:
        reasons.append(f"it refuses buffers that the training moved, here {_some(buffers)}")
    biased = _biased(slots, biases)
    if biased:
        reasons.append(f"it refuses biases, here of {_some(biased)}")
    if rows:
        reasons.append(f"it refuses trained rows of embeddings, here {_some(rows)}")
    return reasons


def vllm_rank(slots: Mapping[str, LayerConfig]) -> int:
    """Return the smallest ``--max-lora-rank`` that vLLM takes and that is enough."""
    highest = max((slot.r for slot in slots.values()), default=0)
    return next((rank for rank in _VLLM_RANKS if rank >= highest), highest)


def common_scaling(slots: Iterable[LayerConfig]) -> float:
    """Return the factor that most layers have, for clients that know one."""
    return _most_common(slot.scaling for slot in slots)


def one_alpha(slots: Iterable[LayerConfig]) -> float:
    """Return the alpha by which most layers are scaled as alpha / r, for clients that know one."""
    return _most_common(map(_alpha, slots))


def scaling_for(alpha: float, slot: LayerConfig) -> float:
    """Return by what a client that knows one alpha scales a layer: its own factor if it is that."""
    return slot.scaling if _alpha(slot) == alpha else alpha / slot.r


def _alpha(slot: LayerConfig) -> float:
    """Return the alpha by which a layer is scaled as alpha / r."""
    return slot.scaling * slot.r if slot.rslora else slot.alpha


def scaled_otherwise(slots: Mapping[str, LayerConfig]) -> list[str]:
    """Return the layers that llama.cpp's own conversion of a saved adapter scales otherwise."""
    alpha = _most_common(slot.alpha for slot in slots.values())
    return [path for path, slot in slots.items() if slot.scaling != alpha / slot.r]


def _most_common(values: Iterable[float]) -> float:
    counts = collections.Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default=1.0)


def llama_cpp_reasons(
    classes: Collection[str],
    slots: Mapping[str, LayerConfig],
    trained: Iterable[str],
    *,
    tied: Collection[str] = (),
    not_linear: Collection[str] = (),
    buffers: Collection[str] = (),
    biases: Collection[str] = (),
    rows: Collection[str] = (),
) -> list[str]:
    """Return why llama.cpp cannot use an adapter, whatever file it is given.

    Args:
        classes, slots, trained, buffers, biases, rows: As for :func:`vllm_reasons`.
        tied: Those of the layers that share their weight with another module, or may do so.
        not_linear: As for :func:`vllm_reasons`.
    """
    reasons = [] if slots else ["there is no adapted layer"]
    if classes and {*classes}.isdisjoint(LLAMA_CPP):
        reasons.append(
            f"{_first(classes)} is none of the architectures for which its conversion of adapters "
            "is known to be right"
        )
    kept = list(trained)
    if kept:
        reasons.append(f"it drops or refuses modules trained in full, here {_some(kept)}")
    if not_linear:
        reasons.append(f"it converts linear layers only, here also {_some(not_linear)}")
    if buffers:
        moved = _some(buffers)
        reasons.append(f"it drops or refuses buffers that the training moved, here {moved}")
    biased = _biased(slots, biases)
    if biased:
        reasons.append(f"it drops or refuses biases, here of {_some(biased)}")
    if rows:
        reasons.append(f"it refuses trained rows of embeddings, here {_some(rows)}")
    if tied:
        reasons.append(f"it refuses layers that share a weight, here {_some(tied)}")
    return reasons


def _biased(slots: Mapping[str, LayerConfig], others: Iterable[str]) -> list[str]:
    return [*(path for path, slot in slots.items() if slot.bias or slot.lora_bias), *others]


def _first(names: Iterable[str]) -> str:
    return next(iter(names))


def _some(paths: Collection[str]) -> str:
    first = _first(paths)
    return f"{first} and {len(paths) - 1} more" if len(paths) > 1 else first
