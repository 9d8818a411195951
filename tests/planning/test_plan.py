"""The plan counts what wrapping then makes, on real models and on models without weights."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_lora
from hf_lora import SaveError, StateError
from hf_lora.model.registry import registry_of
from tests.model.models import (
    CASES,
    Case,
    classifier,
    each_case,
    each_floating_case,
    gpt2,
    llama,
    t5,
)
from tests.snapshot import low_rank, snapshot
from tests.tiny import Net


def adapter_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [tensor for *_, tensor in registry_of(model).tensors("default")]


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@each_case
def test_what_is_counted_is_what_is_made(case: Case, tmp_path: Path):
    """Parameters, and the bytes of weights, gradients, Adam's moments and the saved file."""
    plan = hf_lora.plan(case.build(), **case.fields)
    model = hf_lora.wrap(case.build(), **case.fields).train()
    tensors = adapter_tensors(model)
    assert plan.weight_bytes == size(tensors)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trains)

    optimizer = torch.optim.Adam(trains)
    output = model(**case.inputs())
    (output if isinstance(output, torch.Tensor) else output.logits).float().sum().backward()
    assert plan.gradient_bytes == size([p.grad for p in trains if p.grad is not None])
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan.adam_bytes == size(moments)

    if case is CASES["shared module"]:  # PEFT's format has no way to say where it stands
        with pytest.raises(SaveError):
            hf_lora.save(model, tmp_path)
        return
    hf_lora.save(model, tmp_path)
    file = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert plan.file_bytes == len(file) - header
    assert json.loads(file[8:header])


@each_case
def test_the_targets_are_the_layers_that_are_made(case: Case):
    model = case.build()
    plan = hf_lora.plan(model, **case.fields)
    assert not plan.problems
    base = dict(model.named_parameters())
    if case.floating:
        assert plan.base_parameters == sum(p.numel() for p in base.values())
        assert plan.base_bytes == size(list(base.values()))
    hosts = {
        target.path: type(model.get_submodule(target.path)).__name__ for target in plan.targets
    }
    assert hosts == {target.path: target.host for target in plan.targets}
    hf_lora.wrap(model, **case.fields)
    registry = registry_of(model)
    assert list(low_rank(registry)) == [target.path for target in plan.targets]
    for target in plan.targets:
        layer = low_rank(registry)[target.path]
        a, b = layer.lora_pair("default")
        assert a.shape == (target.slot.r, target.in_features)
        assert b.shape == (target.out_features, target.slot.r)
        assert a.dtype == b.dtype == target.dtype
        assert layer.lora_slots["default"] == target.slot
        assert target.parameters == a.numel() + b.numel()


@each_floating_case
def test_a_model_without_weights_has_the_same_plan(case: Case):
    """On torch's meta device, where tied weights are tied, and on accelerate's, where not yet."""
    expected = hf_lora.plan(case.build(), **case.fields)
    with torch.device("meta"):
        model = case.build()
    with init_empty_weights():
        other = case.build()
    dtype = next(case.build().parameters()).dtype
    for empty in (model, other):
        assert all(p.is_meta for p in empty.parameters())
        plan = hf_lora.plan(empty.to(dtype), **case.fields)
        assert plan == expected
        assert str(plan) == str(expected)
        if case.fields.get("train"):
            with pytest.raises(StateError, match="on the meta device"):
                hf_lora.wrap(empty, **case.fields)
            assert not any("lora" in key for key in empty.state_dict())


@each_case
def test_making_a_plan_changes_nothing_and_says_the_same_again(case: Case):
    model = case.build()
    before = snapshot(model)
    first = hf_lora.plan(model, **case.fields)
    assert hf_lora.plan(model, **case.fields) == first
    assert snapshot(model) == before


def test_a_plan_as_text():
    model = classifier()
    plan = hf_lora.plan(model, ["query", "value"], r=4, alpha=6, train=["classifier"])
    lines = str(plan).splitlines()
    assert lines[0] == (
        f"BertForSequenceClassification: {model.num_parameters():,} parameters, "
        f"{4 * model.num_parameters() / 1024:.1f} KiB"
    )
    assert [line.split() for line in lines[1:5]] == [
        ["layer", "class", "in", "->", "out", "r", "alpha", "dropout", "layers", "parameters"],
        ["query", "Linear", "32", "->", "32", "4", "6", "0", "2", "512"],
        ["value", "Linear", "32", "->", "32", "4", "6", "0", "2", "512"],
        ["classifier", "Linear", "in", "full", "1", "99"],
    ]
    assert lines[5].startswith("trains 1,123 parameters (")
    assert "weights 4.4 KiB, gradients 4.4 KiB, Adam 8.8 KiB, file 4.4 KiB" in lines[5]
    still = model.num_parameters() - 4 * (32 * 32 + 32) - 99
    assert plan.untouched == still
    share = 100 * still / model.num_parameters()
    assert (
        lines[6]
        == f"untouched: {share:.1f} % of the base's parameters, in layers without an update"
    )
    assert lines[7].startswith("vLLM cannot serve it: BertForSequenceClassification is none of")
    assert lines[8].startswith("llama.cpp cannot use it: BertForSequenceClassification")
    assert len(lines) == 9


def test_patterns_are_counted_one_by_one():
    plan = hf_lora.plan(llama(), ["q_proj", r"self_attn\..*", r"layers\.0\.mlp\.up_proj"], r=4)
    assert plan.matches == {"q_proj": 2, r"self_attn\..*": 8, r"layers\.0\.mlp\.up_proj": 1}
    assert len(plan.targets) == 9
    assert [t.path for t in plan.targets][:2] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]


@pytest.mark.parametrize(
    ("build", "count", "head"),
    [
        (llama, 14, ["lm_head"]),
        (gpt2, 8, ["lm_head"]),
        (t5, 32, ["lm_head"]),
        (classifier, 13, ["classifier"]),
    ],
    ids=["llama", "gpt2", "t5", "classifier"],
)
def test_all_linear_is_all_but_the_head(build, count: int, head: list[str]):
    model = build()
    plan = hf_lora.plan(model, r=4)
    assert len(plan.targets) == count
    assert {path for path, why in plan.left_out.items() if why == "output head"} == set(head)
    named = hf_lora.plan(model, head, r=2)
    assert [target.path for target in named.targets] == head


def test_what_is_left_out_has_its_reason():
    plan = hf_lora.plan(
        llama(),
        [".*_proj", "norm"],
        r=4,
        exclude=[r"layers\.1\..*", "o_proj"],
        train=[r"layers\.0\.mlp"],
    )
    assert plan.left_out["model.layers.0.self_attn.o_proj"] == "excluded by 'o_proj'"
    assert plan.left_out["model.layers.1.self_attn.o_proj"] == r"excluded by 'layers\\.1\\..*'"
    assert plan.left_out["model.layers.0.mlp.up_proj"] == "trained in full"
    assert [t.path.rsplit(".", 1)[1] for t in plan.targets] == ["q_proj", "k_proj", "v_proj"]
    assert plan.problems == (
        "'norm' matches only modules that cannot be adapted "
        "(1; model.norm: LlamaRMSNorm is no linear layer, convolution, embedding, attention "
        "or stack of experts)",
    )
    assert "left out: model.layers.1.self_attn.q_proj and 6 more" in str(plan)


def test_excluding_what_is_no_target_anyway_is_fine_but_a_typo_is_not():
    plan = hf_lora.plan(llama(), r=4, exclude=["lm_head"])
    assert not plan.problems
    plan = hf_lora.plan(llama(), r=4, exclude=["lm_haed"])
    assert plan.problems == ("exclude 'lm_haed' matches no module; near: lm_head",)


def test_a_pattern_of_which_all_is_excluded_is_told():
    plan = hf_lora.plan(llama(), ["q_proj", "v_proj"], r=4, exclude="v_proj")
    assert plan.matches == {"q_proj": 2, "v_proj": 0}
    assert "'v_proj' adapts nothing: all of it is left out" in plan.notes
    plan = hf_lora.plan(llama(), ["v_proj"], r=4, exclude="v_proj")
    assert plan.problems[0].startswith("every matching layer is left out: model.layers.0")


def test_overrides_first_pattern_wins():
    plan = hf_lora.plan(
        llama(),
        ["q_proj", "v_proj"],
        r=4,
        alpha=8,
        overrides={
            r"layers\.0\.self_attn\.q_proj": {"r": 1},
            "q_proj": {"alpha": 3.0, "dropout": 0.5},
        },
    )
    slots = {
        t.path.replace("model.layers.", "").replace("self_attn.", ""): t.slot for t in plan.targets
    }
    assert [(k, s.r, s.alpha, s.dropout) for k, s in slots.items()] == [
        ("0.q_proj", 1, 8.0, 0.0),
        ("0.v_proj", 4, 8.0, 0.0),
        ("1.q_proj", 4, 3.0, 0.5),
        ("1.v_proj", 4, 8.0, 0.0),
    ]
    plan = hf_lora.plan(
        llama(),
        "q_proj",
        r=4,
        overrides={".*q_proj": {"r": 2}, "q_proj": {"r": 1}, "v_proj": {"r": 1}, "zzz": {"r": 1}},
    )
    assert plan.problems == (
        "overrides 'q_proj' is never used: earlier patterns take its layers",
        *plan.problems[1:],
    )
    assert plan.problems[1].startswith("overrides 'v_proj' matches none of the adapted layers")
    assert plan.problems[2].startswith("overrides 'zzz' matches none of the adapted layers")


def test_all_problems_are_told_at_once_with_near_misses():
    model = llama()
    with pytest.raises(hf_lora.TargetError) as caught:
        hf_lora.wrap(
            model,
            ["q_porj", "rotary_emb", "input_layernorm", "v_proj", "self_attn", "norm.weight"],
            r=20,
            exclude=["layer.9"],
            train=["scoer", "rotary_emb", "mpl"],
            overrides={"o_proj": {"r": 2}},
        )
    text = str(caught.value)
    lines = [line.removeprefix("  - ") for line in text.splitlines()]
    assert lines[0] == "This LlamaForCausalLM cannot be wrapped so:"
    assert lines[1].startswith("train 'scoer' matches no module; near:")
    assert lines[2].startswith("train 'rotary_emb' matches only modules without parameters")
    assert lines[3].startswith("train 'mpl' matches no module; near: mlp")
    assert lines[4].startswith("exclude 'layer.9' matches no module")
    assert lines[5].startswith("'q_porj' matches no module; near: q_proj")
    assert "(1; model.rotary_emb: LlamaRotaryEmbedding is no linear layer" in lines[6]
    assert "(2; model.layers.0.input_layernorm: LlamaRMSNorm is no linear layer" in lines[7]
    assert "(2; model.layers.0.self_attn: LlamaAttention is no linear layer" in lines[8]
    assert lines[9].startswith("'norm.weight' means the parameter model.norm.weight of shape (32,)")
    assert lines[10].startswith("overrides 'o_proj' matches none of the adapted layers")
    assert lines[11].startswith("model.layers.0.self_attn.v_proj: r=20 is larger than the layer's")
    assert lines[12].startswith("model.layers.1.self_attn.v_proj: r=20 is larger")
    assert lines[13].startswith("See print(hf_lora.plan(")
    assert len(lines) == 14
    assert type(model.model.layers[0].self_attn.v_proj) is nn.Linear
    assert text.count("PROBLEM") == 0
    assert str(hf_lora.plan(model, "q_porj")).splitlines()[-1].startswith("PROBLEM: 'q_porj'")


def test_a_model_without_any_linear_layer():
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    assert hf_lora.plan(model).problems == (
        "'all-linear' matches nothing: the model has no linear layer",
    )
    assert hf_lora.plan(model, "q_proj").problems == (
        "'q_proj' matches no module; the model has no linear layer at all",
    )


def test_tied_weights_are_told():
    plan = hf_lora.plan(llama(tied=True), ["lm_head", "q_proj"], r=4)
    note = "lm_head shares its weight with model.embed_tokens; merging unties it"
    assert plan.notes == (note,)
    assert f"note: {note}" in str(plan)
    assert plan.targets[-1].tied_to == ("model.embed_tokens",)
    plan = hf_lora.plan(llama(tied=True), "q_proj", r=4, train=["embed_tokens"])
    assert plan.trained[0].tied_to == ("lm_head",)
    assert not hf_lora.plan(llama(), ["lm_head"], r=4).notes


def test_a_module_in_two_places_is_one_layer_under_either_name():
    model = CASES["shared module"].build()
    plan = hf_lora.plan(model, "second.0", r=2)
    assert [target.path for target in plan.targets] == ["first.2"]
    assert "second.0 is the same module as first.2" in plan.notes
    excluded = hf_lora.plan(model, ".*", r=2, exclude="second.0")
    assert "first.2" in excluded.left_out
    hf_lora.wrap(model, "second.0", r=2)
    assert model.first[2] is model.second[0]
    assert hf_lora.plan(CASES["shared module"].build(), ["first.2", "second.0"], r=2).matches == {
        "first.2": 1,
        "second.0": 1,
    }


def test_stacked_experts_and_routers_are_told():
    config = Qwen3MoeConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    plan = hf_lora.plan(model, "q_proj", r=4)
    assert "4 stacked parameters, as experts have them, stay frozen" in plan.notes[0]
    assert "gate_up_proj" in plan.notes[0] or "down_proj" in plan.notes[0]
    assert not plan.missed
    assert "targets can name experts.gate_up_proj and experts.down_proj" in plan.notes[0]
    problem = hf_lora.plan(model, ["q_proj", "mlp.gate.weight"], r=4).problems[0]
    assert "means the parameter model.layers.0.mlp.gate.weight of shape (4, 32)" in problem
    assert "Qwen3MoeTopKRouter does not declare" in problem
    problem = hf_lora.plan(model, "mlp.gate", r=4).problems[0]
    assert "is no linear layer, convolution, embedding, attention or stack of experts" in problem


def test_the_dtype_is_chosen_by_the_base_or_by_the_configuration():
    for base, chosen in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        plan = hf_lora.plan(Net().to(base), "q_proj", r=2)
        assert {target.dtype for target in plan.targets} == {chosen}
    plan = hf_lora.plan(Net(), "q_proj", r=2, dtype="bfloat16")
    assert plan.weight_bytes == 2 * plan.parameters


def test_the_plan_of_a_wrapped_model_is_that_of_its_base():
    expected = hf_lora.plan(classifier(), "query", r=4, train=["classifier"])
    model = hf_lora.wrap(classifier(), "query", r=4, train=["classifier"])
    assert hf_lora.plan(model, "query", r=4, train=["classifier"]) == expected
