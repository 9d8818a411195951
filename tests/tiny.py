"""Small models and adapters for tests that are about something else than the model.

For transformers' models, see ``tests.oracle.architectures``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_lora

WIDTH = 8


class Block(nn.Module):
    """Two linear layers of different shapes."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.v_proj(self.norm(x)).chunk(2, dim=-1)
        return x + self.q_proj(torch.tanh(gate) * value)


class Net(nn.Module):
    """A stack of blocks with a head: what an adapter file can be about, at no cost."""

    def __init__(self, layers: int = 2, seed: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def rows() -> torch.Tensor:
    """Return an input for a :class:`Net`."""
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def answers(model: nn.Module) -> torch.Tensor:
    """Return what a :class:`Net` makes of :func:`rows`, without dropout."""
    training = model.training
    found = model.eval()(rows())
    model.train(training)
    return found


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 3) -> None:
    """Give everything that trains other values, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(seed: int = 3, layers: int = 2, **fields: Any) -> Net:
    """Return a wrapped :class:`Net` whose adapter says something."""
    options = {"targets": ["q_proj", "v_proj"], "r": 2, "alpha": 4.0} | fields
    model = hf_lora.wrap(Net(layers), **options)
    scramble(model, seed)
    return model


def saved(directory: Path, seed: int = 3, **fields: Any) -> torch.Tensor:
    """Save such an adapter and return what the model answers with it."""
    model = adapted(seed, **fields)
    hf_lora.save(model, directory)
    return answers(model)
