"""Every class of experts that declares its layout to transformers, by a layer of its own."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import models

import hf_lora
from hf_lora.compat.experts import declared
from hf_lora.kinds.experts import LoRAExperts

MODELS = Path(models.__file__).parent
COUNTS = {"num_experts_per_tok": 2, "top_k": 2, "moe_topk": 2, "moe_top_k": 2}
KNOWN = 60
"""Fewer would mean that something was not found, and not that all is well."""


class Sizes:
    """Small numbers under whatever name a class reads them from its configuration."""

    def __init__(self) -> None:
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for known, value in (
            (name in COUNTS, COUNTS.get(name)),
            ("expert" in name, 3),
            ("act" in name, "silu"),
            ("intermediate" in name or "ffn" in name, 8),
            ("latent" in name, None),
            ("hidden" in name or "size" in name or "dim" in name, 16),
            ("eps" in name, 1e-6),
            ("limit" in name, 7.0),
            (name.startswith("use") or "bias" in name, False),
        ):
            if known:
                return value
        return 1.5


def classes() -> Iterator[type[nn.Module]]:
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        if "@use_experts_implementation" not in file.read_text():
            continue
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        for found in vars(importlib.import_module(name)).values():
            own = inspect.isclass(found) and found.__module__ == name
            if own and issubclass(found, nn.Module) and hasattr(found, "_apply_gate"):
                yield found


def made(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = kind(Sizes()).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def difference(kind: type[nn.Module]) -> float:
    """Return how far outputs and gradients are from those of whole matrices, relatively."""
    net: Any = nn.ModuleDict({"experts": made(kind)})
    layer: Any = hf_lora.wrap(net, ["experts"], r=2, alpha=2)["experts"]
    said = declared(layer)
    assert isinstance(layer, LoRAExperts)
    assert said is not None
    factors = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in factors.values():
            parameter.normal_(std=0.3)
    number, *wide = getattr(layer, said.up).shape
    rows = torch.randn(7, wide[0 if said.transposed else 1], dtype=torch.float64)
    chosen = torch.stack([torch.randperm(number)[:2] for _ in range(7)])
    leaves = [rows.requires_grad_(), torch.rand(7, 2, dtype=torch.float64).requires_grad_()]
    whole = {}
    for part in layer.lora_parts(layer):
        a, b = (factors[f"lora_{part}_{factor}"] for factor in "AB")
        delta = torch.einsum("ore,eri->eoi", b.view(len(b), 2, number), a.view(number, 2, -1))
        delta = delta.transpose(1, 2) if said.transposed else delta
        whole[part] = getattr(layer, part) + delta
    given = layer(rows, chosen, leaves[1])
    wanted = torch.func.functional_call(layer.base, whole, (rows, chosen, leaves[1]))
    leaves += factors.values()
    flow = torch.randn_like(given)
    pairs = zip(
        (given, *torch.autograd.grad(given, leaves, flow)),
        (wanted, *torch.autograd.grad(wanted, leaves, flow)),
        strict=True,
    )
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


@pytest.mark.slow
def test_each_computes_as_whole_matrices_do():
    found = {kind.__name__: difference(kind) for kind in classes()}
    assert len(found) >= KNOWN
    # three of them compute in float32, whatever they are given
    assert not {name: far for name, far in found.items() if not far < 1e-5}
