"""Parameter groups: who is in which, LoRA+ by hand, what is refused, what a step costs."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

import hf_lora
from hf_lora.errors import ConfigError, GradientError, HfLoRAWarning, StateError
from hf_lora.model.registry import registry_of
from tests.model.models import CASES, Case, classifier, each_case, gpt2, llama, t5
from tests.tiny import Net, adapted, rows

GROUPS = ["lora_A", "lora_B", "trained", "trained_no_decay"]


def names_by_group(model: nn.Module, **numbers: float) -> dict[str, set[str]]:
    """Group to the model's own names of its tensors."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = hf_lora.optimizer_groups(model, **{"lr": 1e-3, **numbers})
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


class TestWhoIsIn:
    @each_case
    def test_everything_that_trains_is_in_one_group(self, case: Case):
        model = hf_lora.wrap(case.build(), **case.fields)
        groups = names_by_group(model)
        members = Counter(name for names in groups.values() for name in names)
        assert members == {n: 1 for n, p in model.named_parameters() if p.requires_grad}
        registry = registry_of(model)
        roles = {key: role for _, role, key in registry.keys("default")}
        for name in ("lora_A", "lora_B"):
            assert {roles[key] for key in groups[name]} == {name}
        copies = groups.get("trained", set()) | groups.get("trained_no_decay", set())
        assert {key.rpartition(".")[0] for key in copies} == set(registry.exclusive)

    def test_the_groups_say_what_they_are(self):
        model = adapted(train=["head"])
        groups = hf_lora.optimizer_groups(model, lr=1e-3, weight_decay=0.1, b_lr_ratio=4)
        assert [list(group) for group in groups] == [["name", "params", "lr", "weight_decay"]] * 4
        assert [group["name"] for group in groups] == GROUPS
        assert [group["lr"] for group in groups] == [1e-3, 4e-3, 1e-3, 1e-3]
        assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]

    def test_without_numbers_nothing_decays_and_all_learn_alike(self):
        for group in hf_lora.optimizer_groups(adapted(train=["head"]), lr=np.float32(0.5)):
            assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)

    def test_groups_that_would_be_empty_are_left_out(self):
        assert list(names_by_group(adapted())) == ["lora_A", "lora_B"]
        only_a_head = adapted(train=["head"])
        for *_, role, tensor in registry_of(only_a_head).tensors("default"):
            tensor.requires_grad_(role not in ("lora_A", "lora_B"))
        assert list(names_by_group(only_a_head)) == ["trained", "trained_no_decay"]

    def test_all_adapters_that_train_are_in_and_no_others(self):
        model = adapted()
        hf_lora.add_adapter(model, "fr", "q_proj", r=3, train=["head"])
        hf_lora.add_adapter(model, "cold", "v_proj", r=1, trainable=False)
        both = names_by_group(model)
        assert len(both["lora_A"]) == len(both["lora_B"]) == 2 * 2 + 2
        assert both["trained"] == {"head.lora_copy_weight_fr"}
        assert both["trained_no_decay"] == {"head.lora_copy_bias_fr"}
        hf_lora.freeze(model, "default")
        assert names_by_group(model)["lora_B"] == {f"layers.{i}.q_proj.lora_B_fr" for i in (0, 1)}

    def test_what_a_layer_of_the_base_calls_lora_a_is_no_factor(self):
        """A module trained in full keeps its tensors' names, whatever they are."""

        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.lora_B = nn.Parameter(torch.ones(2, 2))

        model = hf_lora.wrap(nn.Sequential(nn.Linear(2, 2), Odd()), "0", r=1, train=["1"])
        groups = names_by_group(model, b_lr_ratio=8)
        assert groups["lora_B"] == {"0.lora_B"}
        assert len(groups["trained"]) == 1

    def test_a_compiled_model_has_the_groups_of_its_own(self):
        model = adapted()
        inner, outer = (
            [id(p) for group in hf_lora.optimizer_groups(m, lr=1) for p in group["params"]]
            for m in (model, torch.compile(model))
        )
        assert inner == outer

    def test_parameters_of_the_base_that_require_gradients_are_told(self):
        model = adapted()
        model.head.bias.requires_grad_(True)
        with pytest.warns(HfLoRAWarning, match=r"no group:\n  - head\.bias\n.*train=\[") as caught:
            groups = names_by_group(model)
        assert caught[0].filename == __file__
        assert "head.bias" not in set().union(*groups.values())


NORMS_AND_MORE: dict[str, tuple[Callable[[], nn.Module], str, list[str]]] = {
    "llama": (llama, "q_proj", ["lm_head", "embed_tokens", "norm", "input_layernorm"]),
    "bert": (classifier, "query", ["classifier", "pooler", "LayerNorm", "position_embeddings"]),
    "gpt2": (gpt2, "c_attn", ["ln_f", "ln_1", "wte", r"mlp\.c_proj"]),
    "t5": (t5, "q", ["final_layer_norm", "layer_norm", "lm_head"]),
}


class TestDecay:
    @pytest.mark.parametrize(
        ("build", "targets", "train"), NORMS_AND_MORE.values(), ids=NORMS_AND_MORE
    )
    def test_trainer_would_spare_the_same(
        self, build: Callable[[], nn.Module], targets: str, train: list[str]
    ):
        model = hf_lora.wrap(build(), targets, r=2, train=train)
        groups = names_by_group(model, weight_decay=0.1)
        trainer: Any = transformers.Trainer
        decayed = set(trainer.get_decay_parameter_names(None, model))
        assert groups["lora_A"] | groups["lora_B"] | groups["trained"] <= decayed
        assert groups["trained_no_decay"]
        assert not groups["trained_no_decay"] & decayed

    def test_norms_are_told_by_type_and_shape_and_not_by_name(self):
        norms = [nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.LayerNorm((2, 4))]
        model = nn.Sequential(nn.Linear(4, 4), *norms, nn.Conv1d(4, 4, 2))
        hf_lora.wrap(model, "0", r=1, train=["[1-5]"])
        groups = names_by_group(model, weight_decay=0.1)
        assert groups["trained"] == {"5.lora_copy_weight"}
        assert len(groups["trained_no_decay"]) == 2 + 2 + 1 + 2 + 1

    def test_a_bias_for_each_expert_is_a_bias(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.down_proj = nn.Parameter(torch.ones(3, 2, 2))
                self.down_proj_bias = nn.Parameter(torch.ones(3, 2))

        model = hf_lora.wrap(nn.Sequential(nn.Linear(2, 2), Experts()), "0", r=1, train=["1"])
        groups = names_by_group(model, weight_decay=0.1)
        assert groups["trained"] == {"1.lora_copy_down_proj"}
        assert groups["trained_no_decay"] == {"1.lora_copy_down_proj_bias"}


LR, DECAY, RATIO = 0.02, 0.3, 16.0


def adamw(p: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """AdamW as its paper has it, after the gradients seen so far were used for a step each."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        p = p - lr * decay * p - lr * step
    return p


@pytest.mark.parametrize("fused", [False, True])
def test_two_steps_are_those_of_lora_plus_by_hand(fused: bool):
    """``y = head(tanh(W x + b + s B A x))`` written out in float64, the head trained in full."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    w, b = model[0].weight.clone(), model[0].bias.clone()
    hf_lora.wrap(model, "0", r=2, alpha=3.0, train=["2"])
    with torch.no_grad():
        model[0].lora_B.normal_()  # at zero the first step would leave A alone
    start = {
        "A": model[0].lora_A,
        "B": model[0].lora_B,
        "head": model[2].lora_copy_weight,
        "head bias": model[2].lora_copy_bias,
    }
    start = {name: tensor.detach().clone() for name, tensor in start.items()}
    groups = hf_lora.optimizer_groups(model, lr=LR, weight_decay=DECAY, b_lr_ratio=RATIO)
    optimizer = torch.optim.AdamW(groups, fused=fused)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    numbers = {"A": (LR, DECAY), "B": (LR * 16, DECAY), "head": (LR, DECAY), "head bias": (LR, 0)}
    now, grads = start, {name: [] for name in start}
    for _ in range(2):
        now = {name: tensor.detach().requires_grad_() for name, tensor in now.items()}
        hidden = torch.tanh(x @ (w + 3.0 / 2 * now["B"] @ now["A"]).T + b)
        (hidden @ now["head"].T + now["head bias"]).square().mean().backward()
        for name, tensor in now.items():
            grads[name].append(tensor.grad)
        now = {name: adamw(start[name], grads[name], *numbers[name]) for name in start}
    found = (model[0].lora_A, model[0].lora_B, model[2].weight, model[2].bias)
    for name, tensor in zip(start, found, strict=True):
        torch.testing.assert_close(tensor.detach(), now[name].detach(), rtol=1e-10, atol=1e-12)


OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "Adafactor": torch.optim.Adafactor,
    "NAdam": torch.optim.NAdam,
    "RMSprop": torch.optim.RMSprop,
    "transformers' Adafactor": lambda groups: transformers.Adafactor(groups, relative_step=False),
    "bitsandbytes' 8-bit AdamW": bnb.optim.AdamW8bit,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_take_the_groups_and_keep_their_names(make: Callable):
    model = hf_lora.wrap(CASES["classifier"].build(), **CASES["classifier"].fields)

    def built() -> torch.optim.Optimizer:
        return make(hf_lora.optimizer_groups(model, lr=1e-2, weight_decay=0.1, b_lr_ratio=8))

    optimizer = built()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        model(**CASES["classifier"].inputs()).logits.square().mean().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    again = built()
    again.load_state_dict(optimizer.state_dict())
    assert [group["name"] for group in again.param_groups] == GROUPS
    assert [group["lr"] for group in again.param_groups] == [1e-2, 8e-2, 1e-2, 1e-2]


class TestRefusals:
    def test_every_wrong_number_is_named_at_once(self):
        with pytest.raises(ConfigError) as caught:
            hf_lora.optimizer_groups(adapted(), lr=0, weight_decay=-0.1, b_lr_ratio=math.inf)
        assert str(caught.value) == (
            "These parameter groups cannot be made:\n"
            "  - lr: 0 is not a finite number above 0\n"
            "  - weight_decay: -0.1 is not a finite number at least 0\n"
            "  - b_lr_ratio: inf is not a finite number above 0"
        )

    @pytest.mark.parametrize("name", ["lr", "weight_decay", "b_lr_ratio"])
    @pytest.mark.parametrize(
        "value", [-1, math.nan, math.inf, "1e-4", True, None, 1j, pytest.param(10**400, id="huge")]
    )
    def test_no_number_slips_through(self, name: str, value: Any):
        with pytest.raises(ConfigError, match=name):
            hf_lora.optimizer_groups(adapted(), **{"lr": 1e-3, name: value})

    @pytest.mark.parametrize(("lr", "ratio"), [(1e200, 1e200), (1e-200, 1e-200)])
    def test_a_product_out_of_range_is_told(self, lr: float, ratio: float):
        with pytest.raises(ConfigError, match="times an lr of 1e"):
            hf_lora.optimizer_groups(adapted(), lr=lr, b_lr_ratio=ratio)

    def test_a_model_that_is_not_wrapped(self):
        with pytest.raises(StateError, match=r"This Net is not wrapped; call hf_lora\.wrap"):
            hf_lora.optimizer_groups(Net(), lr=1e-3)

    def test_a_model_that_is_merged(self):
        model = hf_lora.merge(adapted())
        with pytest.raises(StateError, match="Cannot train while default is merged"):
            hf_lora.optimizer_groups(model, lr=1e-3)
        assert hf_lora.optimizer_groups(hf_lora.unmerge(model), lr=1e-3)

    def test_a_layer_that_was_replaced_since(self):
        model = adapted()
        model.layers[0].q_proj = nn.Linear(8, 8)
        with pytest.raises(StateError, match=r"layers\.0\.q_proj is no longer part of the model"):
            hf_lora.optimizer_groups(model, lr=1e-3)

    def test_everything_frozen(self):
        model = hf_lora.add_adapter(adapted(), "fr", "q_proj", r=1)
        hf_lora.freeze(model, ["default", "fr"])
        message = (
            r"Nothing would train:\n  - 'default' is frozen\n  - 'fr' is frozen\nUse .*unfreeze"
        )
        with pytest.raises(GradientError, match=message):
            hf_lora.optimizer_groups(model, lr=1e-3)


def calls_of_a_step(layers: int) -> Counter[str]:
    """What one step of fused AdamW calls, on a net with ``4 * layers`` factors."""
    model = adapted(layers=layers)
    groups = hf_lora.optimizer_groups(model, lr=1e-3, b_lr_ratio=16)
    assert sum(len(group["params"]) for group in groups) == 4 * layers
    optimizer = torch.optim.AdamW(groups, fused=True)
    model(rows()).square().mean().backward()
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    return Counter(
        event.key
        for event in profiler.events()
        if event.cpu_parent is not None and event.cpu_parent.key.startswith("Optimizer.step")
    )


def test_the_calls_of_a_step_do_not_grow_with_the_number_of_tensors():
    """One update and one increment of the step counters for each group, however many tensors."""
    expected = {"aten::_fused_adamw_": 2, "aten::_foreach_add_": 2}
    assert calls_of_a_step(layers=2) == calls_of_a_step(layers=40) == expected
