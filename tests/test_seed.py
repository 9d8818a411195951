"""The two texts that hf_lora began with: every number worked out and every list printed in them.

Their calls stand here as they were written: ``LoRALinear(module, r=r, alpha=alpha)`` and
``apply_lora(model, r=8, alpha=16.0)``.
"""

import contextlib
import inspect
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lora
from hf_lora import LoRALinear, apply_lora


class TestALinearLayer:
    """3 features in, 2 out, by hand.

    The texts print [2.1, 4.7]. Their own last step is [1.4, 3.2] + [0.7, 0.8], which is
    [2.1, 4.0], and so says PyTorch: the 4.7 has the first bias in it as well.
    """

    x = torch.tensor([[1.0, 2.0, 3.0]])
    w = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    b = torch.tensor([0.7, 0.8])
    y = torch.tensor([[2.1, 4.0]])
    printed = torch.tensor([[2.1, 4.7]])

    def layer(self) -> nn.Linear:
        layer = nn.Linear(in_features=3, out_features=2, bias=True)
        with torch.no_grad():
            layer.weight = nn.Parameter(self.w.clone())
            layer.bias = nn.Parameter(self.b.clone())
        return layer

    def test_the_output(self) -> None:
        torch.testing.assert_close(self.layer()(self.x), self.y)

    def test_the_output_as_printed_is_off_by_the_first_bias(self) -> None:
        off = torch.tensor([[0.0, self.b[0]]])
        torch.testing.assert_close(self.layer()(self.x) + off, self.printed)

    def test_the_steps(self) -> None:
        product = self.x @ self.w.T
        torch.testing.assert_close(product, torch.tensor([[1.4, 3.2]]))
        torch.testing.assert_close(product + self.b, self.y)

    def test_a_fresh_lora_layer_answers_the_same(self) -> None:
        layer = self.layer()
        expected = layer(self.x)
        adapted = LoRALinear(layer, r=1)
        assert torch.equal(adapted(self.x), expected)
        torch.testing.assert_close(adapted(self.x), self.y)

    def test_its_parameters(self) -> None:
        layer = self.layer()
        assert (layer.weight.numel(), layer.bias.numel()) == (6, 2)
        assert sum(parameter.numel() for parameter in layer.parameters()) == 8
        assert hf_lora.plan(layer, ".*", r=1).base_parameters == 8


class TestTheScalingProblem:
    """One layer of a language model, 4096 by 4096."""

    def test_all_of_it(self) -> None:
        layer = nn.Linear(4096, 4096, device="meta")
        assert layer.weight.numel() == 16_777_216
        assert layer.bias.numel() == 4096
        assert hf_lora.plan(layer, ".*", r=8).base_parameters == 16_781_312

    def test_with_lora_at_rank_8(self) -> None:
        layer = nn.Linear(4096, 4096, bias=False, device="meta")
        plan = hf_lora.plan(layer, ".*", r=8)
        assert plan.base_parameters == 16_777_216
        assert plan.parameters == (8 * 4096) + (4096 * 8) == 65_536
        assert f"{100 * (1 - plan.parameters / plan.base_parameters):.2f}%" == "99.61%"

    def test_the_layer_holds_what_the_plan_says(self) -> None:
        layer = LoRALinear(nn.Linear(4096, 4096, bias=False), r=8)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 65_536


class TestTheWorkedExample:
    """4 by 3, rank 2, alpha 4."""

    w_frozen = torch.tensor([[1.0, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    a = torch.tensor([[1.0, 0, 2], [0, 3, 0]])
    b = torch.tensor([[1.0, 0], [0, 0], [0, 2], [1, 1]])
    b_a = torch.tensor([[1.0, 0, 2], [0, 0, 0], [0, 6, 0], [1, 3, 2]])
    delta_w = torch.tensor([[2.0, 0, 4], [0, 0, 0], [0, 12, 0], [2, 6, 4]])
    w_eff = torch.tensor([[3.0, 1, 5], [2, 2, 2], [3, 15, 3], [6, 10, 8]])
    x = torch.tensor([1.0, 2, 3])
    y = torch.tensor([20.0, 12, 42, 50])

    def base(self) -> nn.Linear:
        base = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            base.weight.copy_(self.w_frozen)
        return base

    @torch.no_grad()
    def trained(self, layer: LoRALinear) -> LoRALinear:
        """Give the layer the values that training is said to have found."""
        assert layer.lora_A.shape == (2, 3)
        assert layer.lora_B.shape == (4, 2)
        layer.lora_A.copy_(self.a)
        layer.lora_B.copy_(self.b)
        return layer

    def layer(self) -> LoRALinear:
        return self.trained(LoRALinear(self.base(), r=2, alpha=4))

    def test_the_update(self) -> None:
        layer = self.layer()
        assert layer.scaling == 2
        assert torch.equal(layer.lora_B @ layer.lora_A, self.b_a)
        assert torch.equal(layer.lora_delta("default"), self.delta_w)

    def test_the_lora_path(self) -> None:
        layer = self.layer()
        a_x = F.linear(self.x, layer.lora_A)
        b_a_x = F.linear(a_x, layer.lora_B)
        assert a_x.tolist() == [7, 6]
        assert b_a_x.tolist() == [7, 0, 12, 13]
        assert (layer.scaling * b_a_x).tolist() == [14, 0, 24, 26]
        assert (layer(self.x) - layer.base(self.x)).tolist() == [14, 0, 24, 26]

    def test_the_frozen_path(self) -> None:
        assert self.layer().base(self.x).tolist() == [6, 12, 18, 24]

    def test_the_output(self) -> None:
        assert torch.equal(self.layer()(self.x), self.y)

    def test_the_merge(self) -> None:
        layer = apply_lora(self.base(), r=2, alpha=4)
        frozen = layer.weight
        assert isinstance(layer, LoRALinear)
        self.trained(layer)
        hf_lora.merge(layer)
        assert torch.equal(layer.weight, self.w_eff)
        assert torch.equal(layer(self.x), self.y)
        hf_lora.unmerge(layer)
        assert layer.weight is frozen
        assert torch.equal(layer.weight, self.w_frozen)

    def test_after_the_merge_it_is_a_standard_linear_layer(self) -> None:
        layer = apply_lora(self.base(), r=2, alpha=4)
        self.trained(layer)
        hf_lora.merge_and_unwrap(layer)
        assert type(layer) is nn.Linear
        assert [name for name, _ in layer.named_parameters()] == ["weight"]
        assert torch.equal(layer.weight, self.w_eff)
        assert torch.equal(layer(self.x), self.y)


class TestLoRALinear:
    """The layer: its signature, its attributes, what it freezes and how it starts."""

    def test_the_signature(self) -> None:
        parameters = inspect.signature(LoRALinear.__init__).parameters
        assert list(parameters) == ["self", "base", "r", "alpha"]
        assert parameters["alpha"].default == 16.0
        assert LoRALinear(nn.Linear(8, 8), 4).alpha == 16.0

    def test_the_attributes(self) -> None:
        base = nn.Linear(12, 20)
        layer = LoRALinear(base, r=4, alpha=8.0)
        assert (layer.r, layer.alpha, layer.scaling) == (4, 8.0, 2.0)
        assert type(layer.base) is nn.Linear
        assert layer.base.weight is base.weight
        assert layer.base.bias is base.bias
        assert isinstance(layer.lora_A, nn.Parameter)
        assert isinstance(layer.lora_B, nn.Parameter)
        assert layer.lora_A.shape == (4, 12)
        assert layer.lora_B.shape == (20, 4)

    def test_weight_and_bias_are_frozen_and_the_factors_are_not(self) -> None:
        base = nn.Linear(12, 20)
        layer = LoRALinear(base, r=4)
        assert not base.weight.requires_grad
        assert not base.bias.requires_grad
        assert layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad

    def test_a_layer_without_bias(self) -> None:
        layer = LoRALinear(nn.Linear(12, 20, bias=False), r=4)
        assert layer.base.bias is None
        assert layer(torch.ones(2, 12)).shape == (2, 20)

    def test_how_the_factors_start(self) -> None:
        base = nn.Linear(64, 64)
        torch.manual_seed(5)
        layer = LoRALinear(base, r=16)
        torch.manual_seed(5)
        expected = nn.init.kaiming_uniform_(torch.empty(16, 64), a=math.sqrt(5))
        assert torch.equal(layer.lora_A, expected)
        assert not layer.lora_B.any()

    def test_it_begins_as_the_layer_that_it_was_given(self) -> None:
        base = nn.Linear(12, 20)
        x = torch.randn(3, 5, 12)
        assert torch.equal(LoRALinear(base, r=4)(x), base(x))

    def test_its_output_is_the_formula(self) -> None:
        layer = LoRALinear(nn.Linear(12, 20), r=4, alpha=8.0)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(3, 12)
        update = F.linear(F.linear(x, layer.lora_A), layer.lora_B) * layer.scaling
        torch.testing.assert_close(layer(x), layer.base(x) + update)


def toy() -> nn.Sequential:
    """Return the toy model of the texts."""
    return nn.Sequential(
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


TRAINABLE = ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]


class TestApplyLora:
    """The whole model: which layers, what prints, what trains."""

    def test_the_signature(self) -> None:
        parameters = inspect.signature(apply_lora).parameters
        assert list(parameters) == ["model", "r", "alpha"]
        assert parameters["alpha"].default == 16.0

    def test_the_layers_at_the_top_are_replaced_by_lora_linear(self) -> None:
        model = toy()
        apply_lora(model, r=8, alpha=16.0)
        assert [type(module) for module in model] == [LoRALinear, nn.ReLU, LoRALinear]
        assert (model[0].r, model[0].alpha, model[0].scaling) == (8, 16.0, 2.0)

    def test_layers_at_any_depth_are_replaced(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Sequential(toy()), nn.Linear(9, 9)))
        apply_lora(model, r=2)
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        assert linear == ["0", "1.0.0.0", "1.0.0.2", "1.1"]
        assert all(type(model.get_submodule(name)) is LoRALinear for name in linear)

    def test_the_model_may_be_a_linear_layer_itself(self) -> None:
        layer = nn.Linear(8, 8)
        apply_lora(layer, r=2)
        assert type(layer) is LoRALinear
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]

    def test_print_shows_lora_linear(self) -> None:
        model = toy()
        apply_lora(model, r=8, alpha=16.0)
        assert repr(model).count("LoRALinear(") == 2
        assert "(0): LoRALinear(in_features=128, out_features=256" in repr(model)
        assert "(2): LoRALinear(in_features=256, out_features=10" in repr(model)
        assert ": Linear(" not in repr(model)

    def test_the_printed_list_of_trainable_parameters(self) -> None:
        model = toy()
        apply_lora(model, r=8, alpha=16.0)
        trainable_param_names = [n for n, p in model.named_parameters() if p.requires_grad]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            print("\nTrainable Parameters:")
            for name in trainable_param_names:
                print(name)
        assert printed.getvalue() == "\nTrainable Parameters:\n" + "\n".join(TRAINABLE) + "\n"

    def test_the_frozen_weights_can_be_reached_where_the_texts_look_for_them(self) -> None:
        model = toy()
        weights = model[0].weight, model[2].weight
        apply_lora(model, r=8, alpha=16.0)
        assert (model[0].base.weight, model[2].base.weight) == weights
        assert not any(weight.requires_grad for weight in weights)

    def test_the_model_begins_as_it_was(self) -> None:
        model, x = toy(), torch.randn(4, 128)
        expected = model(x)
        apply_lora(model, r=8, alpha=16.0)
        assert torch.equal(model(x), expected)

    def test_layers_replaced_one_by_one_as_the_texts_do(self) -> None:
        model = nn.Sequential(toy())
        expected = toy()
        expected.load_state_dict(model[0].state_dict())
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                parent_name, child_name = name.rsplit(".", 1)
                parent_module = model.get_submodule(parent_name)
                setattr(parent_module, child_name, LoRALinear(module, r=8, alpha=16.0))
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"0.{name}" for name in TRAINABLE
        ]
        x = torch.randn(4, 128)
        assert torch.equal(model(x), expected(x))


class TestTraining:
    """The optimizer that sees the factors only."""

    @pytest.fixture
    def trained(self) -> tuple[nn.Sequential, dict[str, torch.Tensor], list[float]]:
        """Return the toy model after a short training, its base before, and the losses."""
        x = torch.randn(256, 128)
        labels = (x[:, :10] + 0.1 * torch.randn(256, 10)).argmax(dim=1)
        model = toy()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        apply_lora(model, r=8, alpha=16.0)
        trainable_params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable_params, lr=1e-2)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model, before, losses

    def test_it_holds_the_factors_and_nothing_else(self) -> None:
        model = toy()
        apply_lora(model, r=8, alpha=16.0)
        trainable_params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable_params, lr=1e-4)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        factors = [f for layer in (model[0], model[2]) for f in (layer.lora_A, layer.lora_B)]
        assert [id(p) for p in held] == [id(f) for f in factors]
        assert sum(p.numel() for p in held) == 8 * (128 + 256) + 8 * (256 + 10)

    def test_the_loss_falls(self, trained) -> None:
        _, _, losses = trained
        assert losses[-1] < losses[0] / 2

    def test_the_factors_move_and_the_base_does_not(self, trained) -> None:
        model, before, _ = trained
        after = model.state_dict()
        assert all(model.get_parameter(f"{n}.lora_B").any() for n in ("0", "2"))
        assert all(
            after[name].numpy().tobytes() == value.numpy().tobytes()
            for name, value in before.items()
        )
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    def test_merging_what_was_learned_keeps_the_answers(self, trained) -> None:
        model, _, _ = trained
        x = torch.randn(16, 128)
        expected = model(x)
        hf_lora.merge(model)
        torch.testing.assert_close(model(x), expected)


def test_in_a_language_model_only_the_named_layers_are_adapted() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    hf_lora.wrap(model, targets=["q_proj", "v_proj"])
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert adapted == [
        f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    ]
