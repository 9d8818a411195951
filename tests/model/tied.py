"""Models that tie their embeddings in several ways, for tests of what an adapter does with that."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from tests.model.models import TOKENS, gpt2, llama, t5


class Own(nn.Module):
    """A model of somebody's own that ties by assignment, the head before the embeddings."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 24, bias=False)
        self.embed = nn.Embedding(24, 16)
        self.embed.weight = self.head.weight
        self.body = nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(input_ids)))


def own() -> nn.Module:
    torch.manual_seed(11)
    return Own().eval()


def bart() -> nn.Module:
    torch.manual_seed(11)
    sizes: dict[str, Any] = {"vocab_size": 48, "d_model": 32, "max_position_embeddings": 32}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 40}
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes)).eval()


def bert() -> hf.BertForMaskedLM:
    """Return a masked language model, whose head has a bias of its own beside the tied weight."""
    torch.manual_seed(11)
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 32}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes)).eval()


@dataclasses.dataclass(frozen=True)
class Tied:
    """A model, what is adapted of it by low rank, and the modules that share the embeddings."""

    build: Callable[[], Any]
    target: str
    ends: tuple[str, ...]
    decoder: bool = False

    def logits(self, model: nn.Module) -> torch.Tensor:
        ids = TOKENS % 24
        output = model(ids, decoder_input_ids=ids) if self.decoder else model(ids)
        return output if isinstance(output, torch.Tensor) else output.logits

    def wrap(self, train: Sequence[str], model: Any = None, **fields: Any) -> Any:
        model = self.build() if model is None else model
        return hf_lora.wrap(model, self.target, r=2, train=train, **fields)


_SEQ2SEQ = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
LLAMA = Tied(lambda: llama(tied=True), "q_proj", ("model.embed_tokens", "lm_head"))
MODELS = {
    "llama": LLAMA,
    "gpt2": Tied(gpt2, "c_attn", ("transformer.wte", "lm_head")),
    "t5": Tied(t5, "q", (*_SEQ2SEQ, "lm_head"), decoder=True),
    "bart": Tied(bart, "q_proj", (*(f"model.{p}" for p in _SEQ2SEQ), "lm_head"), decoder=True),
    "own": Tied(own, "body", ("head", "embed")),
}
each_model = pytest.mark.parametrize("tied", MODELS.values(), ids=MODELS)
NAMED = [
    pytest.param(tied, train, id=f"{name}-{'+'.join(train)}")
    for name, tied in MODELS.items()
    for train in (tied.ends[:1], tied.ends[-1:], *((tied.ends[::-1],) if name == "llama" else ()))
]
each_end = pytest.mark.parametrize(("tied", "train"), NAMED)


def weights(model: nn.Module, tied: Tied) -> list[Any]:
    return [model.get_submodule(end).weight for end in tied.ends]


def is_one(tensors: Sequence[torch.Tensor]) -> bool:
    return all(tensor is tensors[0] for tensor in tensors)


def copies(model: nn.Module) -> list[nn.Parameter]:
    """Return what trains besides factors, each once."""
    return [p for n, p in model.named_parameters() if p.requires_grad and "lora_copy" in n]


def base_weight(model: nn.Module, tied: Tied) -> torch.Tensor:
    """Return what the base has there, under an adapter."""
    with hf_lora.no_adapter(model):
        return weights(model, tied)[0]
