"""One model with every kind of layer that has a low-rank update, and adapters for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_lora
from hf_lora.kinds.conv import LoRAConv
from tests.tiny import scramble

Make = Callable[[], nn.Module]

EVERY = ["embed", "linear", "turned", "conv", "grouped", "attn"]


class Zoo(nn.Module):
    """Layers side by side, none of which depends on another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embed = nn.Embedding(13, 6)
        self.linear = nn.Linear(6, 9)
        self.turned = Conv1D(7, 6)
        self.conv = nn.Conv2d(3, 8, (3, 2))
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embed(ids)
        image = x.repeat(1, 2, 2)[:, None].expand(-1, 3, -1, -1)
        wave = x.flatten(1).repeat(1, 4).view(len(x), 4, -1)
        answers = (self.linear(x), self.turned(x), self.conv(image), self.grouped(wave))
        return (*answers, self.attn(x, x, x)[0], self.head(x))


IDS = torch.tensor([[1, 2, 3], [4, 5, 12]])


def saved(folder: Path, seed: int, targets: Any = EVERY, make: Make = Zoo, **fields: Any) -> Path:
    """Save an adapter that says something and return its folder."""
    options = {"r": 2, "alpha": 3.0} | fields
    model = hf_lora.wrap(make(), targets, **options)
    scramble(model, seed)
    hf_lora.save(model, folder)
    return folder


def deltas(folder: Path, make: Make = Zoo) -> dict[str, torch.Tensor]:
    """Return by how much an adapter changes each parameter, in float64, as a load and a merge say.

    Of a grouped convolution, whose update is no change of its weight, the impulse response.
    """
    model = make().double().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hf_lora.load(model, folder)
    grouped = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoRAConv) and module.groups != 1  # type: ignore[comparison-overlap]
    }
    found = {}
    for path, module in grouped.items():
        host: Any = module
        x = torch.eye(host.in_channels * 3, dtype=torch.float64).view(-1, host.in_channels, 3)
        with torch.no_grad():
            with_it = host(x)
            with hf_lora.no_adapter(model):
                found[f"{path}.response"] = with_it - host(x)
    for path, module in model.named_modules():
        if hasattr(module, "lora_merged") and path not in grouped:
            for role, merged in module.lora_merged((("default", 1.0),), None).items():  # type: ignore[operator]
                name = f"{path}.{role}"
                found[name] = merged.detach().double() - before[name]
    return found


def total(parts: list[tuple[float, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Return a weighted sum of changes; what one lacks is zero."""
    found: dict[str, torch.Tensor] = {}
    for weight, part in parts:
        for name, delta in part.items():
            found[name] = found[name] + weight * delta if name in found else weight * delta
    return found
