"""Tiny mixtures of experts, with adapters that do something."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora.kinds.experts import LoRAExperts

PARTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.arange(14).view(2, 7)
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


def qwen3_moe() -> Any:
    config = hf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=5, head_dim=8)
    return hf.Qwen3MoeForCausalLM(config)


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4))


def deepseek_v3() -> Any:
    sizes = SIZES | {"num_key_value_heads": 4}
    config = hf.DeepseekV3Config(
        **sizes,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    return hf.DeepseekV3ForCausalLM(config)


def gpt_oss() -> Any:
    kinds = ["full_attention", "sliding_attention"]
    config = hf.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, layer_types=kinds)
    return hf.GptOssForCausalLM(config)


def granitemoe() -> Any:
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**SIZES, num_local_experts=4))


def llama4() -> Any:
    config = hf.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=24, num_local_experts=3, head_dim=8, pad_token_id=0
    )
    return hf.Llama4ForCausalLM(config)


MODELS = {f.__name__: f for f in (qwen3_moe, mixtral, deepseek_v3, gpt_oss, granitemoe, llama4)}
PEFTS = {n: MODELS[n] for n in ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "llama4")}
every = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
some = pytest.mark.parametrize("make", PEFTS.values(), ids=PEFTS)


def built(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    model = make().to(dtype).eval()
    with torch.no_grad():  # biases are zero at first, and the rest is small
        for name, parameter in model.named_parameters():
            if "experts." in name and parameter.dim() > 1:
                parameter.normal_(std=0.2)
    if dtype == torch.float64 and make is not llama4:  # PyTorch's grouped product has no such type
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def loud(model: Any) -> Any:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora" in name and ("_B" in name):
            parameter.normal_(std=0.2)
    return model.eval()


def wrapped(
    make: Callable[[], Any], dtype: torch.dtype = torch.float32, targets: Any = PARTS, **fields: Any
) -> Any:
    return loud(hf_lora.wrap(built(make, dtype), targets, **{"r": 3, "alpha": 6, **fields}))


def layers_of(model: Any) -> dict[str, Any]:
    return {p: m for p, m in model.named_modules() if isinstance(m, LoRAExperts)}


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten())
