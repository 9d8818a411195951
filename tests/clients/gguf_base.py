"""A model as llama.cpp reads it, written tensor by tensor, and what llama.cpp makes of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

from tests.clients.installed import installed

MANY = 40
"""Of how many words the probability is compared."""


def halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: of each head the first of each half, then the second of each, and so on."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def write_base(model: Any, path: Path, name: str) -> None:
    """Write a Llama, a Qwen2 or a GPT-2 (``name`` as llama.cpp calls it), in float32.

    Its words are made up: nothing but their numbers is used.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = [f"w{i} " for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(config.vocab_size - 1)
    table = gguf.get_tensor_name_map(
        next(arch for arch, called in gguf.MODEL_ARCH_NAMES.items() if called == name),
        config.num_hidden_layers,
    )
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        if name == "llama" and "q_proj" in key:
            tensor = halves(tensor, config.num_attention_heads)
        if name == "llama" and "k_proj" in key:
            tensor = halves(tensor, config.num_key_value_heads)
        if name == "gpt2" and ".c_" in key and key.endswith("weight"):
            tensor = tensor.t()
        called = table.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(called, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def told(base: Path, ids: Sequence[int], adapter: Path | None = None) -> dict[int, float]:
    """Return the likeliest next words after some, as llama.cpp has them: log-probabilities."""
    xllamacpp: Any = installed("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.warmup, params.n_parallel, params.verbosity = 64, False, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # its default keeps keys and values in 16 bits
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    asked = {"prompt": list(ids), "n_predict": 1, "temperature": 0.0, "n_probs": MANY}
    answer = xllamacpp.Server(params).handle_completions(asked)
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {each["id"]: each["logprob"] for each in first["top_logprobs"]}
