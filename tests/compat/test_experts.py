"""What transformers' layers of experts say of themselves, by which theirs and ours compute."""

import inspect

import torch
from transformers import Llama4TextConfig, Qwen3MoeConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_lora.compat.experts import (
    Declared,
    activation,
    declared,
    forward_below,
    is_expert_parallel,
)


def experts() -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=4, num_experts=3)
    return Qwen3MoeExperts(config)


def test_the_options_of_the_decorator_are_those_that_are_read():
    known = {
        "is_concatenated",
        "is_transposed",
        "has_bias",
        "has_gate",
        "has_post_expert_norm",
    }
    options = inspect.signature(use_experts_implementation).parameters
    assert options.keys() - {"experts_class", "experts_interface"} == known


def test_an_instance_says_what_its_class_was_decorated_with():
    assert declared(experts()) == Declared(
        "gate_up_proj", "down_proj", transposed=False, has_bias=False, has_gate=True, has_norm=False
    )
    assert declared(torch.nn.Linear(2, 2)) is None


def test_expert_parallelism_is_marked_on_the_instance():
    layer = experts()
    assert "_is_expert_parallel" in vars(layer)
    assert not is_expert_parallel(layer)
    layer._is_expert_parallel = True
    assert is_expert_parallel(layer)


def test_the_gate_is_a_method_and_the_own_forward_is_below():
    rows = torch.linspace(-2, 2, 16).view(2, 8)
    gate, up = rows.chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    said = declared(experts())
    assert said is not None
    assert torch.equal(activation(experts(), said)(rows), want)
    own = forward_below(Qwen3MoeExperts, said)
    assert own is not None
    assert own is not Qwen3MoeExperts.forward
    assert "expert_hit" in own.__code__.co_varnames
    assert forward_below(torch.nn.Linear, said) is None


def test_llama_4_says_nothing_and_stands_in_the_table():
    config = Llama4TextConfig(hidden_size=8, intermediate_size=4, num_local_experts=3)
    layer = Llama4TextExperts(config)
    assert "is_transposed" not in vars(layer)
    said = declared(layer)
    assert said is not None
    assert said.takes_every
    assert forward_below(Llama4TextExperts, said) is Llama4TextExperts.forward
