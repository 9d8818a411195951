"""Layers of somebody's own, with sizes and a forward but nothing of nn.Linear."""

import torch
from torch import nn

IN, OUT = 6, 10


class Own(nn.Module):
    """A layer that has nothing of PyTorch's own but sizes and a forward."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.weight = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: torch.Tensor, gain: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
        return x @ self.weight.T * gain + shift


class Transposed(Own):
    """Keeps its weight the other way round, where a square one would not show it."""

    def __init__(self, out_features: int = OUT):
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.randn(IN, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Routed(Own):
    """Cannot be called with its input alone."""

    def forward(self, x: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T * route
