"""Stacked experts: low-rank updates of routed tokens, equal to those of dense matrices."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora.errors import TargetError
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.merging.hand_over import merged_tensors
from tests.kinds.expert_models import (
    PARTS,
    TOKENS,
    built,
    every,
    gpt_oss,
    layers_of,
    loss_of,
    loud,
    mixtral,
    qwen3_moe,
    wrapped,
)
from tests.rounding import assert_rounded_alike


def dense_twin(model: Any, make: Callable[[], Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of a plain model with whole matrices, and the gradients of A and B."""
    plain = built(make, torch.float64)
    leaves, weights = {}, {}
    for path, layer in layers_of(model).items():
        config = layer.lora_slots["default"]
        for part in config.parts:
            stack = plain.get_parameter(f"{path}.{part}")
            names = [f"{path}.lora_{part}_{factor}" for factor in "AB"]
            a, b = (
                leaves.setdefault(
                    name, model.get_parameter(name).detach().double().requires_grad_()
                )
                for name in names
            )
            a_ERI = a.view(len(stack), config.r, -1)
            b_ORE = b.view(len(b), config.r, len(stack))
            delta = config.scaling * torch.einsum("ore,eri->eoi", b_ORE, a_ERI)
            is_transposed = getattr(plain.get_submodule(path), "is_transposed", False)
            weights[f"{path}.{part}"] = stack + (delta.transpose(1, 2) if is_transposed else delta)
    loss = loss_of(torch.func.functional_call(plain, weights, (TOKENS,)).logits)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss, dict(zip(leaves, found, strict=True))


@every
def test_outputs_and_gradients_are_those_of_dense_matrices(make: Callable[[], Any]):
    model = wrapped(make, torch.float64)
    loss = loss_of(model(TOKENS).logits)
    loss.backward()
    want, gradients = dense_twin(model, make)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
    assert len(gradients) == 4 * len(layers_of(model)) > 0
    for name, gradient in gradients.items():
        given = model.get_parameter(name).grad
        torch.testing.assert_close(given, gradient, rtol=1e-7, atol=1e-10, msg=name)


@every
def test_the_fused_way_is_rounded_as_the_plain_one(make: Callable[[], Any]):
    exact_loss, exact = dense_twin(wrapped(make), make)

    def run(plain: bool) -> list[torch.Tensor]:
        model = wrapped(make)
        next(iter(layers_of(model).values())).lora_routing.plain = plain
        loss = loss_of(model(TOKENS).logits)
        loss.backward()
        return [loss, *(model.get_parameter(name).grad for name in exact)]

    assert_rounded_alike((run(False), run(True), [exact_loss, *exact.values()]))


@every
def test_it_begins_as_the_base_and_is_taken_off_without_a_trace(make: Callable[[], Any]):
    base = built(make)
    want, names = base(TOKENS).logits, list(base.state_dict())
    model = hf_lora.wrap(built(make), PARTS, r=3)
    assert torch.equal(model(TOKENS).logits, want)
    assert [name for name in model.state_dict() if "lora_" not in name] == names
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    loud(model)
    assert not torch.allclose(model(TOKENS).logits, want)
    with hf_lora.no_adapter(model):
        assert torch.equal(model(TOKENS).logits, want)
    model = hf_lora.unwrap(model)
    assert not layers_of(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(TOKENS).logits, want)


@every
def test_merging_is_exact_and_undone(make: Callable[[], Any]):
    model = wrapped(make, torch.float64)
    want = model(TOKENS).logits
    (layer, *_) = layers_of(model).values()
    before = layer.gate_up_proj, layer.down_proj
    for _ in range(2):
        hf_lora.merge(model)
        torch.testing.assert_close(model(TOKENS).logits, want)
        assert layer.down_proj is not before[1]
        hf_lora.unmerge(model)
        assert layer.gate_up_proj is before[0]
        assert layer.down_proj is before[1]
        assert torch.equal(model(TOKENS).logits, want)
    plain = hf_lora.merge_and_unwrap(model)
    assert not layers_of(plain)
    torch.testing.assert_close(plain(TOKENS).logits, want)


def test_several_adapters_are_added_up_with_their_weights():
    model = wrapped(qwen3_moe, torch.float64)
    hf_lora.add_adapter(model, "b", PARTS[1:], r=2)
    loud(model)
    (layer, *_) = layers_of(model).values()
    outputs = {}
    for names in ("default", "b", {"default": 0.5, "b": 2.0}):
        hf_lora.activate(model, names)
        outputs[str(names)] = model(TOKENS).logits
        hf_lora.merge(model)
        torch.testing.assert_close(model(TOKENS).logits, outputs[str(names)])
        hf_lora.unmerge(model)
    assert len({out.sum().item() for out in outputs.values()}) == 3
    hf_lora.delete_adapter(model, "b")
    assert not [name for name in layer._parameters if name.endswith("_b")]


def test_dropout_is_for_training_only_and_is_kept_in_our_header(tmp_path: Path):
    model = wrapped(qwen3_moe, dropout=0.5)
    want = wrapped(qwen3_moe)(TOKENS).logits
    assert torch.equal(model(TOKENS).logits, want)
    model.train()
    first = model(TOKENS).logits
    assert not torch.equal(first, model(TOKENS).logits)
    with pytest.warns(hf_lora.HfLoRAWarning, match="has no dropout there"):
        hf_lora.save(model, tmp_path)
    assert "lora_dropout" not in json.loads((tmp_path / "adapter_config.json").read_text())
    again = hf_lora.load(built(qwen3_moe), tmp_path)
    (layer, *_) = layers_of(again).values()
    assert layer.lora_slots["default"].dropout == 0.5


@every
def test_activation_checkpointing_gives_the_same_gradients(make: Callable[[], Any]):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = wrapped(make).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model(TOKENS).logits).backward()
        return [p.grad for n, p in model.named_parameters() if "lora_" in n]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


def test_it_trains_and_moves_nothing_of_the_base():
    model = hf_lora.wrap(built(qwen3_moe), PARTS, r=3)
    groups = hf_lora.optimizer_groups(model, lr=0.1, b_lr_ratio=4)
    assert [group["name"] for group in groups] == ["lora_A", "lora_B"]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model(TOKENS).logits)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    base = built(qwen3_moe).state_dict()
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items() if n in base)


def test_plan_and_summary_count_what_is_there():
    plan = hf_lora.plan(built(qwen3_moe), PARTS[:1], r=3)
    assert plan.parameters == 2 * (15 * 32 + 32 * 15)
    assert "2 stacked parameters, as experts have them, stay frozen" in str(plan)
    assert "experts.down_proj" in str(plan)
    model = wrapped(qwen3_moe, targets=PARTS[:1])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters
    base = built(qwen3_moe)
    (found,) = hf_lora.summary(model).adapters
    merged = hf_lora.merge_and_unwrap(model)
    for path, norm in found.norms.items():
        name = f"{path}.gate_up_proj"
        moved = merged.get_parameter(name).double() - base.get_parameter(name).double()
        assert norm == pytest.approx(moved.norm().item(), rel=1e-4)


def test_what_a_name_means():
    def parts(targets: Any, **fields: Any) -> list[tuple[str, ...]]:
        plan = hf_lora.plan(built(qwen3_moe), targets, r=2, **fields)
        assert not plan.problems
        return [target.slot.parts for target in plan.targets if target.slot.parts]

    both = ("gate_up_proj", "down_proj")
    assert parts("experts") == [both, both]
    assert parts(PARTS, exclude=["experts.down_proj"]) == [both[:1]] * 2
    assert parts(r"layers\.1\.mlp\.experts\.down_proj") == [both[1:]]
    assert parts(PARTS, exclude=[r"layers\.0\..*"]) == [both]
    # what dense layers are called stays their name
    assert parts(["q_proj", "down_proj"]) == parts("all-linear") == []
    problems = hf_lora.plan(
        built(qwen3_moe), PARTS, r=2, overrides={"experts.down_proj": {"r": 1}}
    ).problems
    assert "those of one layer of experts have the same numbers" in problems[0]
    (problem,) = hf_lora.plan(built(qwen3_moe), PARTS, r=17).problems[:1]
    assert "r=17 is larger than an expert's smaller side, 16" in problem


class Other(nn.Module):
    """Experts that do not declare how they are stacked."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 8))
        self.lin = nn.Linear(4, 4)


def test_experts_that_do_not_say_how_they_compute_are_refused_by_name():
    with pytest.raises(TargetError, match="Module does not declare to transformers"):
        hf_lora.wrap(Other(), ["lin", "experts.gate_up_proj"], r=2)


def test_a_class_that_computes_something_else_than_it_declares_is_refused():
    model = built(gpt_oss)
    for layer in model.model.layers:
        layer.mlp.experts.is_transposed = False
    with pytest.raises(TargetError, match="cannot be computed with as it declares"):
        hf_lora.wrap(model, PARTS, r=2)
    assert not layers_of(model)
    model = built(gpt_oss)
    for layer in model.model.layers:
        layer.mlp.experts.has_bias = False
    with pytest.raises(TargetError, match="something else than the layout that it declares"):
        hf_lora.wrap(model, PARTS, r=2)
    model = built(mixtral)
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = nn.ReLU(inplace=True)
    with pytest.raises(TargetError, match="its activation writes into its input"):
        hf_lora.wrap(model, PARTS, r=2)


def test_a_copy_and_a_pickle_compute_the_same(tmp_path: Path):
    model = wrapped(gpt_oss)
    want = model(TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, want)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(TOKENS).logits, want)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_the_frozen_experts_is_alike(implementation: str):
    model = wrapped(qwen3_moe)
    want = model(TOKENS).logits
    model.set_experts_implementation(implementation)
    assert torch.equal(model(TOKENS).logits, want)


@pytest.mark.filterwarnings("ignore:PEFT finds")
def test_a_training_that_was_cut_short_goes_on_to_the_same_bits(tmp_path: Path):
    drawn = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 48, (7,), generator=drawn) for _ in range(12)]
    data: Any = [{"input_ids": row, "labels": row} for row in rows]

    def run(name: str, resume: str | None = None) -> Any:
        model = hf_lora.wrap(built(qwen3_moe), ["q_proj", *PARTS], r=3, dropout=0.1)
        arguments = hf.TrainingArguments(
            str(tmp_path / name),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            gradient_checkpointing=True,
        )
        hf.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    one, other = run("a"), run("b", str(tmp_path / "a" / "checkpoint-2"))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    held = TensorFile(tmp_path / "a" / "checkpoint-2" / "adapter_model.safetensors").shapes
    assert all("lora_" in key for key in held)


def test_merged_weights_are_handed_over_under_the_bases_names():
    model = wrapped(gpt_oss)
    tensors = dict(merged_tensors(model))
    plain = built(gpt_oss)
    assert tensors.keys() == plain.state_dict().keys()
    plain.load_state_dict(tensors)
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_bases_have_wide_factors(dtype: torch.dtype):
    model = wrapped(qwen3_moe, dtype)
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {p.dtype for p in factors} == {torch.float32}
    loss = loss_of(model(TOKENS).logits.float())
    loss.backward()
    want, _ = dense_twin(wrapped(qwen3_moe), qwen3_moe)
    assert loss.item() == pytest.approx(want.item(), rel=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in factors)


def test_arguments_may_be_named_in_any_order():
    layer = next(iter(layers_of(wrapped(qwen3_moe)).values()))
    rows, experts = torch.randn(6, 32), torch.arange(12).view(6, 2) % 5
    weights = torch.rand(6, 2)
    expected = layer(rows, experts, weights)
    named = layer(top_k_weights=weights, top_k_index=experts, hidden_states=rows)
    assert torch.equal(named, expected)
