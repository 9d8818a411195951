"""Models for tests of whole models, each with a way to wrap it and an input: one for every kind."""

import dataclasses
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf
from torch import nn

TOKENS = torch.arange(1, 13).view(2, 6)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and how to adapt it."""

    build: Callable[[], nn.Module]
    fields: dict[str, Any]
    """Arguments of ``hf_lora.wrap``."""

    inputs: Callable[[], dict[str, torch.Tensor]]
    floating: bool = True
    """Whether its base can be merged into."""


def llama(
    tied: bool = False, layers: int = 2, dtype: torch.dtype = torch.float32, **fields: Any
) -> hf.LlamaForCausalLM:
    """Return a tiny Llama, equal each time."""
    torch.manual_seed(11)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": tied,
    }
    config = hf.LlamaConfig(**sizes | fields)
    # not by a cast afterwards, which would round the rotary frequencies as well
    return hf.LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def gpt2() -> hf.GPT2LMHeadModel:
    """Return a tiny GPT-2: Conv1D layers, a tied head, dropout where it trains."""
    torch.manual_seed(11)
    config = hf.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return hf.GPT2LMHeadModel(config).eval()


def classifier() -> hf.BertForSequenceClassification:
    """Return a tiny encoder with a fresh head."""
    torch.manual_seed(11)
    config = hf.BertConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
    )
    return hf.BertForSequenceClassification(config).eval()


def t5() -> hf.T5ForConditionalGeneration:
    """Return a tiny encoder and decoder that share an embedding."""
    torch.manual_seed(11)
    config = hf.T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config).eval()


class Mixed(nn.Module):
    """A model with a module in two places, buffers, and some parameters frozen before."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(8, 8)
        self.first = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), shared)
        self.second = nn.Sequential(shared, nn.Linear(8, 4))
        self.first[0].weight.requires_grad_(False)
        self.second[1].bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder whose models are equal each time."""

    def again() -> nn.Module:
        torch.manual_seed(11)
        return build().eval()

    return again


def packed() -> nn.Module:
    """Return a 4-bit model."""
    torch.manual_seed(11)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64), nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64))
    return model.to("cpu").eval()


def _tokens(**more: torch.Tensor) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"input_ids": TOKENS, **more}


def _rows(name: str, width: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: torch.randn(5, width, generator=torch.Generator().manual_seed(2))}


CASES: dict[str, Case] = {
    "llama": Case(llama, {"r": 4, "overrides": {"q_proj": {"r": 2, "alpha": 7}}}, _tokens()),
    "llama bf16": Case(
        lambda: llama(dtype=torch.bfloat16), {"targets": ["q_proj", "v_proj"]}, _tokens()
    ),
    "llama tied head": Case(
        lambda: llama(tied=True), {"targets": ["lm_head", "down_proj"], "r": 4}, _tokens()
    ),
    "gpt2": Case(gpt2, {"targets": ["c_attn", "c_proj"], "r": 4, "rslora": True}, _tokens()),
    "classifier": Case(
        classifier, {"targets": ["query", "value"], "train": ["classifier"], "r": 4}, _tokens()
    ),
    "t5": Case(
        t5, {"targets": r"(encoder|decoder)\..*\.(q|wo)", "r": 4}, _tokens(decoder_input_ids=TOKENS)
    ),
    "shared module": Case(
        seeded(Mixed), {"targets": ".*", "r": 2, "train": [r"first\.1"]}, _rows("x", 8)
    ),
    "one layer": Case(
        seeded(lambda: nn.Linear(6, 4)), {"targets": ".*", "r": 2}, _rows("input", 6)
    ),
    "4-bit": Case(packed, {"targets": ".*", "r": 4}, _rows("input", 64), floating=False),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_floating_case = pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.floating],
    ids=[name for name, case in CASES.items() if case.floating],
)


@torch.no_grad()
def answer(model: nn.Module, case: Case) -> torch.Tensor:
    """Return what the model makes of the case's input."""
    output = model(**case.inputs())
    return output if isinstance(output, torch.Tensor) else output.logits


def train_step(model: nn.Module, case: Case, lr: float = 0.05) -> None:
    """Take one step of AdamW on whatever requires gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    output = model(**case.inputs())
    logits = output if isinstance(output, torch.Tensor) else output.logits
    logits.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
