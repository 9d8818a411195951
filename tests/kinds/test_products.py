"""What a kind of layer says of an update in two factors is what it merges."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_lora
from hf_lora.kinds.table import kind_of
from hf_lora.layers.kind import Adaptable
from tests.kinds import expert_models
from tests.tiny import scramble

EXPERTS = {
    "rows": expert_models.qwen3_moe,
    "columns": expert_models.gpt_oss,
    "swapped by PEFT": expert_models.llama4,
}
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 9),
    "transposed": lambda: Conv1D(9, 6),
    "embedding": lambda: nn.Embedding(11, 5),
    "convolution": lambda: nn.Conv2d(3, 8, (3, 2)),
    "convolution of one channel": lambda: nn.Conv1d(4, 1, 3),
}


def merged_by_products(layer: Adaptable, name: str) -> torch.Tensor:
    kind = type(layer)
    assert kind.lora_product_fault(layer) is None
    tensors = layer.lora_tensors("default")
    product = kind.lora_products(layer, layer.lora_slots["default"], tensors)[name]
    weight = layer._parameters[name]
    assert weight is not None
    return weight + (product.left @ product.right).view(weight.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_of_a_layer_with_one_weight(name: str):
    torch.manual_seed(0)
    model = hf_lora.wrap(nn.Sequential(LAYERS[name]()), "0", r=1, alpha=3.0)
    scramble(model)
    expected = merged_by_products(model[0], "weight")
    hf_lora.merge(model)
    assert torch.allclose(model[0].weight, expected, atol=1e-6)


@pytest.mark.parametrize("name", EXPERTS)
def test_of_stacks_of_experts(name: str):
    torch.manual_seed(0)
    model = hf_lora.wrap(EXPERTS[name](), expert_models.PARTS, r=2, alpha=3.0)
    scramble(model)
    layers = [m for m in model.modules() if isinstance(m, Adaptable)]
    assert layers
    found = [(m, p, merged_by_products(m, p)) for m in layers for p in m.lora_parts(m)]
    hf_lora.merge(model)
    for module, part, expected in found:
        assert torch.allclose(getattr(module, part), expected, atol=1e-6)


def test_a_grouped_convolution_has_none():
    layer = nn.Conv2d(4, 8, 3, groups=2)
    kind = kind_of(layer)
    assert kind is not None
    assert "grouped" in (kind.lora_product_fault(layer) or "")
