"""Whole models on the fused path against the same on the plain one, and when they fall back."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LongformerConfig, LongformerModel

import hf_lora
from hf_lora.functional import composed
from hf_lora.layers import fusing
from tests.layers.fused_models import (
    INPUTS,
    assert_plain_gradients,
    assert_plain_output,
    each_adapter,
    gradients,
    groups,
    in_float64,
    llama,
    of,
    routing,
    trials,
    wrapped,
)
from tests.oracle.adapting import scramble
from tests.oracle.architectures import ARCHITECTURES, Architecture, each_architecture
from tests.rounding import assert_rounded_alike

GROUPS = {
    "llama": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "qwen3": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "gemma3": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "phi3": set(),
    "gpt2": set(),
    "gpt_neox": set(),
    "mistral": {"q_proj k_proj v_proj", "gate_proj up_proj"},
    "t5": {"q k v", "k v"},
    "bart": {"q_proj k_proj v_proj", "k_proj v_proj"},
    "bert": {"query key value"},
    "vit": {"q_proj k_proj v_proj"},
    "whisper": {"q_proj k_proj v_proj", "k_proj v_proj"},
}
"""Last names of the layers that read one tensor, as the models' own source has them."""


@pytest.fixture(autouse=True)
def _many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the fused path taken also by the few rows of a test."""
    monkeypatch.setattr(composed, "FEW_ROWS", 0)


@each_architecture
@pytest.mark.parametrize("few", [0, 192])
def test_gradients_are_those_of_the_plain_path(
    architecture: Architecture, few: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(composed, "FEW_ROWS", few)
    assert_rounded_alike(*trials(wrapped(architecture), architecture.inputs()))


@each_architecture
def test_layers_that_read_one_tensor_are_found(architecture: Architecture):
    model = wrapped(architecture)
    gradients(model, architecture.inputs())
    found = {" ".join(path.split(".")[-1] for path in group) for group in groups(model)}
    assert found == GROUPS[architecture.name]
    for group in groups(model):
        assert len({path.rpartition(".")[0] for path in group}) == 1


class TestSteps:
    """A step computes the same however often and after whatever else it is run."""

    def test_the_first_step_is_equal_to_the_second_and_to_a_copy_s(self):
        model = llama()
        other = copy.deepcopy(model)
        one, two = gradients(model, INPUTS), gradients(model, INPUTS)
        three = gradients(pickle.loads(pickle.dumps(other)), INPUTS)
        assert all(map(torch.equal, one, two))
        assert all(map(torch.equal, one, three))

    def test_the_trace_draws_no_random_numbers_and_changes_no_buffer(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
                self.norm = nn.BatchNorm1d(8)
                self.calls = 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.norm(x) + torch.rand(x.shape)
                return F.dropout(self.q(x) * self.k(x), 0.5, self.training)

        torch.manual_seed(0)
        model = hf_lora.wrap(Net(), ["q", "k"], r=2, train=["norm"]).train()
        calls = []
        model.q.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(1)
        first = model(torch.ones(4, 8))
        assert model.norm.num_batches_tracked == 1
        assert len(calls) == 1
        assert groups(model) == [["q", "k"]]
        torch.manual_seed(1)
        assert torch.equal(first, model(torch.ones(4, 8)))

    def test_a_model_whose_forward_fails_on_one_row_is_traced_on_all(self):
        class Pairs(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = x.view(2, -1, 8)
                return self.q(x) + self.k(x)

        model = hf_lora.wrap(Pairs(), ["q", "k"], r=2)
        model(torch.ones(4, 8))
        assert groups(model) == [["q", "k"]]

    def test_a_model_that_cannot_be_traced_trains_all_the_same(self):
        class Once(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
                self.lock = threading.Lock()  # no deepcopy copies a lock

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.q(x) + self.k(x)

        model = hf_lora.wrap(Once(), ["q", "k"], r=2)
        model(torch.ones(4, 8)).sum().backward()
        assert groups(model) == []
        assert model.q.lora_B.grad is not None


class TestFallingBack:
    """What is unusual computes alone, or plainly, and rightly."""

    def test_forward_hooks_of_every_layer_fire_with_its_own_output(self):
        model, seen = llama(), {}
        gradients(model, INPUTS)
        for name in ("q_proj", "k_proj", "v_proj"):
            of(model, f"0.self_attn.{name}").register_forward_hook(
                lambda module, args, y, name=name: seen.__setitem__(name, (args[0], y))
            )
        gradients(model, INPUTS)
        for name, (x, y) in seen.items():
            layer = of(model, f"0.self_attn.{name}")
            assert_plain_output(layer, x, y)
        assert len(seen) == 3

    @pytest.mark.parametrize("name", ["q_proj", "k_proj", "up_proj"])
    def test_a_hook_that_changes_the_input_of_one_layer(self, name: str):
        model = llama()
        gradients(model, INPUTS)
        for path, module in model.named_modules():
            if path.endswith(name):
                module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        assert_plain_gradients(model)

    def test_a_backward_hook_that_changes_the_gradient_of_one_layer(self):
        model = llama()
        of(model, "1.self_attn.v_proj").register_full_backward_hook(
            lambda module, dx, dy: (dx[0] * 3,)
        )
        assert_plain_gradients(model)

    def test_a_layer_that_is_called_alone(self):
        model = llama()
        gradients(model, INPUTS)
        layer, x = of(model, "0.self_attn.q_proj"), torch.randn(3, 32)
        assert_plain_output(layer, x, layer(x))
        other = of(model, "0.self_attn.k_proj")
        assert_plain_output(other, x, other(x))

    def test_an_input_that_is_changed_in_place_between_two_layers(self):
        model = llama()
        gradients(model, INPUTS)
        q, k = of(model, "0.self_attn.q_proj"), of(model, "0.self_attn.k_proj")
        x = torch.randn(3, 32)
        q(x)
        x.mul_(2)
        assert_plain_output(k, x, k(x))

    def test_another_adapter_is_activated_between_two_layers(self):
        model = llama()
        hf_lora.add_adapter(model, "other", targets=["k_proj"], r=2)
        gradients(model, INPUTS)
        q, k = of(model, "0.self_attn.q_proj"), of(model, "0.self_attn.k_proj")
        x = torch.randn(3, 32)
        q(x)
        with hf_lora.use_adapter(model, "other"):
            assert_plain_output(k, x, k(x))

    def test_a_layer_that_does_not_come_is_computed_for_three_times_and_no_more(self):
        class Sometimes(nn.Module):
            def __init__(self):
                super().__init__()
                self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
                return self.q(x) + self.k(x) if both else self.q(x)

        model = hf_lora.wrap(Sometimes(), ["q", "k"], r=2)
        model(torch.ones(2, 8))
        assert groups(model) == [["q", "k"]]
        for _ in range(4):
            assert groups(model) == [["q", "k"]]
            model(torch.ones(2, 8), both=False).sum().backward()
        assert groups(model) == []

    def test_several_adapters_of_different_ranks_and_layers(self):
        model = llama(dropout=0.0)
        hf_lora.add_adapter(model, "second", targets=["k_proj", "gate_proj"], r=3)
        hf_lora.activate(model, ["default", "second"])
        scramble(model)
        assert_plain_gradients(model)

    def test_frozen_adapters_and_a_trained_base_weight(self):
        model = llama()
        of(model, "0.self_attn.k_proj").lora_A.requires_grad_(False)
        of(model, "0.mlp.up_proj").weight.requires_grad_(True)
        assert_plain_gradients(model)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_activation_checkpointing(self, reentrant: bool):
        model = llama(dropout=0.1)
        model.enable_input_require_grads()
        exact = gradients(copy.deepcopy(model).double(), INPUTS)
        alone = gradients(model, INPUTS)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for _ in range(2):
            assert_rounded_alike((gradients(model, INPUTS), alone, exact))
        assert len(groups(model)) == 4

    def test_saved_tensors_that_others_keep_elsewhere(self):
        model = llama()
        alone = gradients(model, INPUTS)
        with torch.autograd.graph.save_on_cpu():
            found = gradients(model, INPUTS)
        assert_rounded_alike((found, alone, in_float64(model, INPUTS)))

    def test_threads_that_share_a_model(self):
        model = llama()
        gradients(model, INPUTS)
        layers = [of(model, f"0.self_attn.{n}_proj") for n in "qkv"]
        xs = [torch.randn(4, 32) for _ in range(4)]
        wanted = [[layer(x) for layer in layers] for x in xs]
        for x, outputs in zip(xs, wanted, strict=True):
            for layer, y in zip(layers, outputs, strict=True):
                assert_plain_output(layer, x, y)
        faults = []

        def work(x: torch.Tensor, wanted: list[torch.Tensor]) -> None:
            for _ in range(50):
                found = [layer(x) for layer in layers]
                if not all(map(torch.equal, found, wanted)):
                    faults.append(x)

        threads = [
            threading.Thread(target=work, args=pair) for pair in zip(xs, wanted, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults

    @pytest.mark.parametrize("kind", ["vmap", "jacrev", "jvp", "functional_call"])
    def test_functional_transforms(self, kind: str):
        model = llama()
        gradients(model, INPUTS)
        layer, x = of(model, "0.mlp.gate_proj"), torch.randn(3, 32)
        calls = {
            "vmap": lambda: torch.vmap(layer)(x),
            "jacrev": lambda: torch.func.jacrev(layer)(x),
            "jvp": lambda: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1],
            "functional_call": lambda: torch.func.functional_call(
                layer, {"lora_B": layer.lora_B * 2}, x
            ),
        }
        found = calls[kind]()
        layer.lora_routing.plain = True
        plain = calls[kind]()
        layer, x = layer.double(), x.double()
        assert_rounded_alike((found, plain, calls[kind]()))

    def test_autocast(self):
        model, trials = llama(), []
        for _ in each_adapter(model, count=4):
            with torch.autocast("cpu", torch.bfloat16):
                found = gradients(model, INPUTS)
            with torch.autocast("cpu", torch.bfloat16):
                plain = gradients(model, INPUTS, plain=True)
            assert all(g.dtype == torch.float32 for g in found)
            trials.append((found, plain, in_float64(model, INPUTS)))
        assert_rounded_alike(*trials)

    def test_a_model_that_edits_what_its_layers_give(self):
        """Longformer divides its queries in place."""
        torch.manual_seed(0)
        config = LongformerConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            attention_window=4,
        )
        model = hf_lora.wrap(LongformerModel(config), "all-linear", r=4).train()
        assert_rounded_alike(*trials(model, {"input_ids": torch.arange(16).view(2, 8) + 2}))

    def test_mixed_types_fail_as_the_plain_layer_does(self):
        layer = hf_lora.LoRALinear(nn.Linear(8, 8), 2)
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(torch.randn(2, 8, dtype=torch.bfloat16))


def test_unwrapping_leaves_no_hook():
    model = llama()
    gradients(model, INPUTS)
    hf_lora.unwrap(model)
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


def test_the_table_is_complete():
    assert GROUPS.keys() == {architecture.name for architecture in ARCHITECTURES}


def test_the_summary_says_how_each_layer_computes():
    model = llama()
    assert "looked for at the first training step" in str(hf_lora.summary(model))
    gradients(model, INPUTS)
    of(model, "1.mlp.down_proj").weight.requires_grad_(True)
    summary = hf_lora.summary(model)
    assert summary.computed["model.layers.0.self_attn.v_proj"] == "together"
    assert summary.computed["model.layers.0.self_attn.o_proj"] == "alone"
    assert summary.computed["model.layers.1.mlp.down_proj"] == "on top"
    assert "computed: 10 layers together with others that read the same tensor, 3 alone, 1 on" in (
        str(summary)
    )
    routing(model).plain = True
    assert set(hf_lora.summary(model).computed.values()) == {"plain"}


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_updates_are_in_float32_where_a_processor_has_no_16_bit_products(
    has: bool, autocast: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fusing, "has_products", lambda dtype: has)
    dtype = torch.float32 if autocast else torch.bfloat16
    model = nn.Sequential(nn.Linear(24, 24).to(dtype), nn.Linear(24, 24).to(dtype))
    hf_lora.wrap(model, targets=["0", "1"], r=4, dropout=dropout)
    scramble(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(torch.randn(9, 24, dtype=dtype))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for layer in model:
        gradient = layer.lora_B.grad
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.bfloat16().float(), gradient) is has


@pytest.mark.parametrize(("kind", "dtype"), [("cpu", torch.float64), ("cuda", torch.bfloat16)])
def test_updates_are_elsewhere_in_the_type_of_the_base(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fusing, "has_products", lambda dtype: False)
    assert fusing.update_type(kind, dtype) == dtype
