"""Tiny models with rows to train, and the plain twin that has them in its weights."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers as hf
from torch import nn

import hf_lora

VOCABULARY = 40
IDS = torch.tensor([[3, 5, 3, 9, 1], [1, 2, 9, 9, 7]])
ROWS = (3, 9, 11)
"""Two that :data:`IDS` has, several times, and one that it has not."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **fields)).eval()


def gemma() -> Any:
    torch.manual_seed(0)
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_key_value_heads", "head_dim")}
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes)).eval()
    with torch.no_grad():
        model.cls.predictions.decoder.bias.normal_()
    return model


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = hf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, **sizes)
    return hf.T5ForConditionalGeneration(config).eval()


MODELS: dict[str, tuple[Any, str]] = {
    "llama": (llama, "embed_tokens"),
    "head": (llama, "lm_head"),
    "tied": (lambda: llama(tie_word_embeddings=True), "embed_tokens"),
    "gemma": (gemma, "embed_tokens"),
    "gpt2": (gpt2, "wte"),
    "bert": (bert, "word_embeddings"),
    "t5": (t5, "shared"),
}
"""Name to what makes a model, and the module whose rows are trained."""


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return what a model is called with."""
    return {"input_ids": IDS} | ({"labels": IDS} if model.config.is_encoder_decoder else {})


def logits(model: nn.Module) -> torch.Tensor:
    return model(**inputs(model)).logits


@torch.no_grad()
def answers(model: nn.Module, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits without gradients: with them, PyTorch's attention may choose other code."""
    return logits(model) if tokens is None else model(tokens).logits


@torch.no_grad()
def loud(model: Any) -> Any:
    """Give what trains other values."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def wrapped(name: str, rows: Iterable[int] = ROWS, **fields: Any) -> Any:
    make, path = MODELS[name]
    return loud(hf_lora.wrap(make(), **{"targets": (), "train_rows": {path: rows}, **fields}))


def rows_of(model: nn.Module, adapter: str = "") -> nn.Parameter:
    """Return the one Parameter that has an adapter's rows."""
    (found,) = (p for n, p in model.named_parameters() if n.endswith(f"lora_rows{adapter}"))
    return found


@torch.no_grad()
def twin(name: str, rows: Iterable[int] = ROWS) -> tuple[Any, nn.Parameter]:
    """Return the plain model with the rows of :func:`wrapped` in it, and the weight they are in."""
    make, path = MODELS[name]
    model = make()
    (module,) = (m for n, m in model.named_modules() if n.rpartition(".")[2] == path)
    module.weight[list(rows)] = rows_of(wrapped(name, rows)).to(module.weight.dtype)
    return model, module.weight
