"""timm's models, by themselves and in transformers' wrapper around them.

timm does not import without torchvision, and torchvision from the package index does not import
beside PyTorch's build for CPUs: its compiled part is for GPUs. Where both are installed to the
side (TIMM_PATH names their folder, or folders), the Python part of torchvision is all that is
needed; its operators are declared here, and not one is called.
"""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from tests.families.walk import SEEN, TOLERANCE, distance
from tests.integrations import training

PATHS = [path for path in os.environ.get("TIMM_PATH", "").split(os.pathsep) if path]


class Block(nn.Module):
    """timm's block, as far as adapters see it: one layer for q, k and v, and scales of its own."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.ls1 = nn.Parameter(torch.ones(width))
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, count, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(rows, count, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.ls1 * self.attn["proj"](seen.reshape(rows, count, width))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    """A model of the same surface as ``timm.create_model("vit_...")``."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 32, 8, 8)})
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 32))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm itself, with the operators declared that torchvision's compiled part would bring."""
    if importlib.util.find_spec("timm") is None and not PATHS:
        pytest.skip("timm is not installed: it needs torchvision, which needs PyTorch for GPUs")
    before, modules = list(sys.path), set(sys.modules)
    sys.path[:0] = PATHS
    library = torch.library.Library("torchvision", "FRAGMENT")
    found = importlib.util.find_spec("torchvision")
    assert found is not None
    assert found.origin is not None
    source = (Path(found.origin).parent / "_meta_registrations.py").read_text()
    names = re.findall(r'register_meta\("(\w+)"\)', source) + re.findall(
        r'"torchvision::(\w+)"', source
    )
    for name in dict.fromkeys(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    yield importlib.import_module("timm")
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def walk(make: Any, size: int, targets: list[str], folder: Path, adapts: int) -> None:
    with training.seeded(5):
        model = make().eval()
    head = next(name for name in ("fc", "head") if hasattr(model, name))
    x, before = images(size), training.snapshot(model)
    with torch.no_grad():
        plain = model(x)
    plan = hf_lora.plan(model, targets, r=2)
    assert len(plan.targets) == adapts, [target.path for target in plan.targets]
    hf_lora.wrap(model, targets, r=2, train=[head])
    with torch.no_grad():
        assert distance(model(x), plain) < TOLERANCE
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert training.same({k: v for k, v in training.snapshot(model).items() if k in before}, before)
    training.scramble(model)
    with torch.no_grad():
        adapted = model(x)
    assert distance(adapted, plain) > SEEN
    hf_lora.save(model, folder)
    with training.seeded(5):
        again = hf_lora.load(make().eval(), folder)
    with torch.no_grad():
        assert distance(again(x), adapted) < TOLERANCE
        hf_lora.merge(model)
        assert distance(model(x), adapted) < 10 * TOLERANCE
    hf_lora.unmerge(model)
    hf_lora.unwrap(model)
    assert training.same(training.snapshot(model), before)


def test_a_model_of_its_surface(tmp_path: Path):
    walk(Vision, 16, ["attention", "mlp"], tmp_path, 8)
    walk(Vision, 16, ["qkv", r"patch_embed\.proj"], tmp_path / "patches", 3)


@pytest.mark.parametrize(
    ("name", "targets", "adapts"),
    [
        ("test_vit", ["attention", "mlp"], 24),
        ("test_vit", ["qkv", r"patch_embed\.proj"], 7),
        ("test_convnext", ["mlp"], 18),
        ("test_resnet", [r"conv\d"], 9),
    ],
)
def test_timms_own(timm: Any, name: str, targets: list[str], adapts: int, tmp_path: Path):
    size = timm.create_model(name).default_cfg["input_size"][-1]
    walk(lambda: timm.create_model(name, num_classes=4), size, targets, tmp_path, adapts)
