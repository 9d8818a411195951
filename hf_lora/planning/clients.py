"""Who else can use an adapter as it is saved, and why not: vLLM and llama.cpp.

What they do was seen with vLLM 0.32 and llama.cpp's converter and runtime of November 2026; which
architectures vLLM gives adapters to is its own list.
"""

from collections.abc import Collection, Iterable, Mapping

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
# Those whose linear layers the converter keeps or permutes as a whole; Llama was run.
_LLAMA_CPP = (
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "GraniteForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM",
    "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip


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


def llama_cpp_reasons(
    classes: Collection[str],
    slots: Mapping[str, LayerConfig],
    trained: Iterable[str],
    *,
    alpha: float,
    tied: Collection[str] = (),
    not_linear: Collection[str] = (),
    buffers: Collection[str] = (),
    biases: Collection[str] = (),
    rows: Collection[str] = (),
) -> list[str]:
    """Return why llama.cpp computes something else with an adapter, or refuses it.

    Args:
        classes, slots, trained, buffers, biases, rows: As for :func:`vllm_reasons`.
        alpha: The one strength that it reads.
        tied: Those of the layers that share their weight with another module, or may do so.
        not_linear: As for :func:`vllm_reasons`.
    """
    reasons = [] if slots else ["there is no adapted layer"]
    if classes and {*classes}.isdisjoint(_LLAMA_CPP):
        reasons.append(
            f"{_first(classes)} is none of the architectures for which its conversion of adapters "
            "is known to be right"
        )
    other = [path for path, slot in slots.items() if slot.scaling != alpha / slot.r]
    if other:
        reasons.append(
            f"it scales every update by {alpha:g} / r, without a word: rsLoRA and other alphas are "
            f"not read, here {_some(other)}"
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
