"""Models with buffers that a training moves, each in a way of its own."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Running(nn.Module):
    """Moves its mean in place and its count by another tensor; the rest stays, or is no result."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
                self.steps = self.steps + 1
                self.cache.add_(1)
        return torch.tanh(x - self.mean)


class Ranged(nn.Linear):
    """A linear layer that keeps the largest input that it has seen, and scales by it."""

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.register_buffer("largest", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.largest = torch.maximum(self.largest, x.detach().abs().max() + 1)
        return super().forward(x / self.largest)


class Codebook(nn.Module):
    """Rounds to codes that follow the mean of what was rounded to them, written by ``.data``."""

    def __init__(self, codes: int = 4, width: int = 6):
        super().__init__()
        self.register_buffer("code", torch.linspace(-1, 1, codes * width).reshape(codes, width))
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("begun", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nearest = torch.cdist(x, self.code).argmin(1)
        if self.training:
            chosen = nn.functional.one_hot(nearest, len(self.code)).to(x.dtype)
            self.count.data.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.code.data.lerp_(chosen.T @ x.detach(), 0.1)
            self.begun.data.fill_(True)
        return x + (self.code[nearest] - x).detach()


class Around(nn.Module):
    """A layer to adapt on each side of what moves."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.fc, self.inner, self.head = nn.Linear(6, 6), inner, nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.fc(x)))


def around(*make: Callable[[], nn.Module]) -> Around:
    """Return a model around one module, or several in a row, with the same weights each time."""
    torch.manual_seed(1)
    made = [each() for each in make]
    return Around(made[0] if len(made) == 1 else nn.Sequential(*made))


def spectral() -> nn.Module:
    """A frozen layer whose norm is estimated: a step of power iteration for each forward."""
    return parametrizations.spectral_norm(nn.Linear(6, 6))


def train(model: nn.Module, steps: int = 3, lr: float = 0.05, x: torch.Tensor = X) -> None:
    """Take plain steps with everything that trains."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def answer(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    """Return what a model makes of the input in eval mode; the mode is as before."""
    training = model.training
    y = model.eval()(x)
    model.train(training)
    return y


def mixture_of_experts(**fields: Any) -> hf.DeepseekV3ForCausalLM:
    """A tiny DeepSeek-V3: one dense layer, and one whose router has a balancing bias."""
    torch.manual_seed(2)
    sizes = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**{**sizes, **fields}))


def balance(model: nn.Module) -> None:
    """Move each router's bias against its load, as DeepSeek-V3's training does after a step."""
    for module in model.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            bias.add_(balanced(1))


def balanced(steps: int) -> torch.Tensor:
    """Return what the bias of :func:`mixture_of_experts` is after so many steps, exactly."""
    return steps * torch.tensor([0.75, 0.25, -0.25, -0.75])
