"""Models on the fused path, their gradients, and how those are compared with the plain path's."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lora
from hf_lora.kinds.lora import LoRALayer
from hf_lora.layers.routing import Routing
from hf_lora.model.registry import registry_of
from tests.oracle.adapting import our_fields, scramble
from tests.oracle.architectures import Architecture
from tests.rounding import Trial, assert_rounded_alike


def wrapped(architecture: Architecture, **fields: Any) -> nn.Module:
    model = hf_lora.wrap(architecture.build(), **our_fields(architecture, **fields))
    scramble(model)
    return model.train()


def routing(model: nn.Module) -> Routing:
    return registry_of(model).routing


def loss(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(5)  # for models that drop
    output = model(**inputs)
    found = output.logits if "logits" in output else output.last_hidden_state
    wide = found.to(torch.promote_types(found.dtype, torch.float32))
    return (wide * torch.linspace(-1, 1, found.numel()).view(found.shape)).sum()


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor], plain: bool = False) -> list:
    routing(model).plain = plain
    model.zero_grad(set_to_none=True)
    loss(model, inputs).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def in_float64(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of the plain path in float64."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return gradients(copy.deepcopy(model).double(), wide, plain=True)


def each_adapter(model: nn.Module, count: int) -> Iterator[None]:
    """Give the model other numbers, again and again; a trial with each makes chance small."""
    start = copy.deepcopy(model.state_dict())
    for seed in range(count):
        model.load_state_dict(start)
        scramble(model, seed)
        yield


def trials(model: nn.Module, inputs: dict[str, torch.Tensor], count: int = 4) -> list[Trial]:
    """Return gradients of our path, of the plain one, and in float64, for several adapters."""
    return [
        (gradients(model, inputs), gradients(model, inputs, plain=True), in_float64(model, inputs))
        for _ in each_adapter(model, count)
    ]


def groups(model: nn.Module) -> list[list[str]]:
    paths = {module: path for path, module in model.named_modules()}
    sharing = routing(model).sharing
    found = ([layer, *sharing.followers(layer)] for layer in paths)
    return [[paths[layer] for layer in group] for group in found if len(group) > 1]


def llama(*, layers: int = 2, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = hf_lora.wrap(LlamaForCausalLM(config), "all-linear", r=4, **fields)
    scramble(model)
    return model.train()


INPUTS = {"input_ids": torch.arange(20).view(2, 10)}


def assert_plain_gradients(model: nn.Module) -> None:
    assert_rounded_alike(*trials(model, INPUTS, count=8))


def of(model: nn.Module, name: str) -> LoRALayer:
    return next(m for path, m in model.named_modules() if path.endswith(name))  # type: ignore[return-value]


def plain(layer: LoRALayer, x: torch.Tensor) -> torch.Tensor:
    before = layer.lora_routing.plain
    layer.lora_routing.plain = True
    try:
        return type(layer).forward(layer, x)
    finally:
        layer.lora_routing.plain = before


def assert_plain_output(layer: LoRALayer, x: torch.Tensor, y: torch.Tensor) -> None:
    exact = plain(copy.deepcopy(layer).double(), x.double())
    assert_rounded_alike((y, plain(layer, x), exact))
