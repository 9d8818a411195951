"""Tiny checkpoints on disk of several families, each with an adapter that does something."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import safe_open

import hf_lora
from tests.kinds import expert_models
from tests.model.models import llama
from tests.tiny import scramble

TOKENS = torch.arange(1, 13).view(2, 6)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def gpt2(**fields: Any) -> Any:
    torch.manual_seed(11)
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes | fields))


def gemma() -> Any:
    torch.manual_seed(11)
    config = hf.Gemma2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return hf.Gemma2ForCausalLM(config)


def t5() -> Any:
    torch.manual_seed(11)
    config = hf.T5Config(
        vocab_size=48,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=True,
    )
    return hf.T5ForConditionalGeneration(config)


def whisper() -> Any:
    torch.manual_seed(11)
    config = hf.WhisperConfig(
        vocab_size=48,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config)


def llava() -> Any:
    torch.manual_seed(11)
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = llama().config
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))


def dinov2() -> Any:
    torch.manual_seed(11)
    config = hf.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        use_swiglu_ffn=True,
    )
    return hf.Dinov2ForImageClassification(config)


def qwen3_vl_moe() -> Any:
    torch.manual_seed(11)
    text = {
        **expert_models.SIZES,
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


@dataclasses.dataclass(frozen=True)
class Family:
    """A base model, and how it is adapted."""

    build: Callable[[], Any]
    fields: dict[str, Any]
    """Arguments of ``hf_lora.wrap``."""

    shards: str = "5GB"
    """How large a file of the checkpoint is at most."""

    names: bool = True
    """Whether the checkpoint has the names that the model has."""


FAMILIES = {
    "llama in shards": Family(llama, {"targets": "all-linear", "r": 4}, shards="20kB"),
    "llama, ranks and rslora": Family(
        llama,
        {
            "targets": "all-linear",
            "r": 4,
            "rslora": True,
            "overrides": {"q_proj": {"r": 2, "alpha": 3.0}},
        },
    ),
    "gpt2, kept as (in, out)": Family(gpt2, {"targets": "all-linear", "r": 4}),
    "gemma with a tied head adapted": Family(
        gemma, {"targets": ["q_proj", "lm_head"], "r": 4}, shards="20kB"
    ),
    "gemma with tied embeddings adapted": Family(gemma, {"targets": ["embed_tokens"], "r": 4}),
    "gemma with both adapted": Family(gemma, {"targets": ["embed_tokens", "lm_head"], "r": 4}),
    "gemma with a tied head trained": Family(
        gemma, {"targets": ["q_proj"], "r": 4, "train": ["lm_head"]}
    ),
    "llama with a head trained": Family(
        llama, {"targets": ["q_proj"], "r": 4, "train": ["lm_head", "norm"]}, shards="20kB"
    ),
    "t5, whose tie scales": Family(t5, {"targets": ["q", "lm_head"], "r": 4}),
    "whisper with convolutions": Family(whisper, {"targets": ["conv1", "conv2", "fc1"], "r": 2}),
    "mixtral's experts, one by one": Family(
        expert_models.mixtral, {"targets": EXPERTS, "r": 3}, shards="40kB", names=False
    ),
    "qwen's experts and attention": Family(
        expert_models.qwen3_moe,
        {"targets": [*EXPERTS, "q_proj"], "r": 3},
        shards="40kB",
        names=False,
    ),
    "gpt-oss, stacked": Family(expert_models.gpt_oss, {"targets": EXPERTS, "r": 3}),
    "llava, renamed": Family(
        llava, {"targets": ["q_proj", "lm_head", "linear_1"], "r": 4}, shards="20kB"
    ),
    "dinov2, of which two layers are one tensor": Family(
        dinov2, {"targets": ["gate_proj", "up_proj", "q_proj"], "r": 4}
    ),
    "qwen 3 vl, stacked": Family(qwen3_vl_moe, {"targets": EXPERTS, "r": 3}),
    "llama 4, swapped": Family(expert_models.llama4, {"targets": EXPERTS, "r": 3}),
}


def made(
    family: Family, folder: Path, dtype: torch.dtype = torch.float32, **fields: Any
) -> tuple[Path, Path, Any]:
    """Return the folders of a base and of an adapter, and the model that the adapter was saved of.

    Args:
        family: What.
        folder: Where.
        dtype: Type of the base.
        fields: Arguments of ``hf_lora.wrap``, beside or instead of the family's own.
    """
    base, adapter = folder / "base", folder / "adapter"
    torch.manual_seed(3)
    model = family.build().to(dtype)
    model.save_pretrained(base, max_shard_size=family.shards)
    model = type(model).from_pretrained(base, dtype=dtype).eval()
    hf_lora.wrap(model, **family.fields | fields)
    scramble(model)
    hf_lora.save(model, adapter)
    return base, adapter, model


def tensors_in(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
