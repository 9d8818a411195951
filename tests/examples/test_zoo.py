"""The zoo's script runs on a handful of types, tells failures apart, and its page counts them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_lora
from examples.benchmarks import zoo, zoo_checks
from examples.benchmarks.zoo_inputs import fitting
from examples.benchmarks.zoo_models import WAYS, classes, configs, shrink, types
from examples.benchmarks.zoo_report import report

HANDFUL = ["llama", "bert", "vit", "t5", "qwen2_moe"]
"""Of every shape: a decoder, an encoder, pictures, both, experts."""


def test_the_types_are_all_that_an_auto_class_of_models_knows():
    found = types()
    assert len(found) > 500
    assert {*HANDFUL, "speech-encoder-decoder", "depth_anything"} <= {*found}
    assert classes("bart")[0] == "BartForConditionalGeneration"
    assert classes("resnet")[-1] == "ResNetModel"


@pytest.mark.parametrize("kind", HANDFUL)
def test_a_type_passes_every_check(kind: str):
    row = zoo.look_at(kind)
    assert (row["result"], row["peft_result"]) == ("pass", "pass"), row
    assert all(row[word] for word in ("layers", "attention", "mlp"))
    assert bool(row["experts"]) == (kind == "qwen2_moe")
    assert row["reached"][0] >= row["reached"][1] - 1


def test_a_model_without_linear_layers_is_refused_with_a_reason():
    row = zoo.look_at("poolformer")
    assert row["result"] == "refused"
    assert row["kind"] == "plan"
    assert "no linear layer" in row["reason"]


def test_what_cannot_be_built_here_says_why():
    row = zoo.look_at("dinat")
    assert row["result"] == "not here"
    assert "natten" in row["reason"]


def broken(change: Any) -> dict[str, Any]:
    """Return the row of a model whose wrapped forward does something else."""
    case = zoo_checks.Case("llama")
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        return zoo._verdict(lambda: zoo_checks.ours(case, seen), seen, "")


def test_a_base_that_moves_an_output_that_differs_and_a_crash_are_told_apart():
    real_wrap, real_merge = hf_lora.wrap, hf_lora.merge

    def grow(module: Any, inputs: Any) -> None:
        if module.training:
            module.weight.data.mul_(1.5)

    def trains_a_norm(model: Any, **fields: Any) -> Any:
        model = real_wrap(model, **fields)
        model.model.norm.register_forward_pre_hook(grow)
        return model

    def off(model: Any, **fields: Any) -> Any:
        real_wrap(model, **fields)
        model.lm_head.register_forward_hook(lambda module, x, y: y * 1.0001)

    def no_merge(model: Any) -> Any:
        real_merge(model)
        hf_lora.unmerge(model)
        hf_lora.activate(model, ())

    def crash(model: Any) -> Any:
        raise RuntimeError("boom")

    module = "examples.benchmarks.zoo_checks.hf_lora"
    assert broken(lambda p: p.setattr(f"{module}.wrap", off))["kind"] == "identity"
    moved = broken(lambda p: p.setattr(f"{module}.wrap", trains_a_norm))
    assert moved["kind"] == "moves the base"
    assert broken(lambda p: p.setattr(f"{module}.merge", no_merge))["kind"] == "merge"
    crashed = broken(lambda p: p.setattr(f"{module}.merge", crash))
    assert crashed["kind"] == "crash in merge"
    assert "boom" in crashed["reason"]


def test_a_process_that_is_killed_or_takes_too_long_is_a_failure_once_its_model_runs(
    monkeypatch: pytest.MonkeyPatch,
):
    def ends(kind: str, built: Any) -> None:
        if kind == "llama":
            built()
        os._exit(7)

    monkeypatch.setattr(zoo, "look_at", ends)
    row = zoo.in_a_fork("llama")
    assert (row["result"], row["reason"]) == ("fail", "ended with 7")
    assert zoo.in_a_fork("bert")["result"] == "not here"

    def spins(kind: str, built: Any) -> None:
        built()
        while True:
            time.process_time()

    monkeypatch.setattr(zoo, "look_at", spins)
    row = zoo.in_a_fork("llama", seconds=1)
    assert row["result"] == "fail"
    assert "took more than 1 s" in row["reason"]


def test_a_run_goes_on_where_it_ended_and_the_page_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = tmp_path / "zoo.jsonl"
    asked: list[str] = []

    def found(kind: str) -> dict[str, Any]:
        asked.append(kind)
        return {"type": kind, "result": "pass", "peft_result": "pass"}

    monkeypatch.setattr(zoo, "types", lambda: ["a", "b", "c"])
    monkeypatch.setattr(zoo, "look_at", lambda kind: None)
    monkeypatch.setattr(zoo, "in_a_fork", found)
    results.write_text(
        json.dumps({"type": "b", "result": "fail", "kind": "merge", "peft_result": "pass"}) + "\n"
    )
    zoo.run(None, results)
    assert asked == ["a", "c"]
    zoo.run(["b"], results)
    rows = zoo.rows(results)
    assert [row["result"] for row in rows] == ["pass"] * 3
    refused = {"type": "d", "result": "refused", "kind": "plan", "reason": "x | y"}
    missing = {"type": "e", "result": "not here", "reason": "it requires the timm library"}
    page = report([*rows, refused | {"peft_result": "fail", "peft_kind": "load"}, missing], 9, "1")
    assert "Of the 9 types" in page
    assert "| pass | 3 of 4 (75.0 %) | 3 of 4 (75.0 %) |" in page
    assert "| refused | plan | 1 | d | x \\| y |" in page
    assert "| 1 | e | timm is not installed |" in page


def test_sizes_are_small_in_all_parts_and_layers_of_every_sort_stay():
    fields = {
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "full", "sliding"],
        "eos_token_id": [7, 50000],
        "text_config": {"vocab_size": 50257, "eos_token_id": 50000, "head_dim": 128},
    }
    small = shrink(fields, WAYS[0], {})
    assert small["hidden_size"] == 32
    assert small["layer_types"] == ["full", "sliding"]
    assert small["num_hidden_layers"] == 2
    assert small["text_config"] == {"vocab_size": 99, "eos_token_id": 1, "head_dim": 8}
    assert small["eos_token_id"] == [0, 1]


def test_inputs_are_those_that_reach_most_of_the_model():
    config = next(configs("clip"))
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    given, reached, leaves = fitting(model, "clip")
    assert {*given} == {"input_ids", "pixel_values"}
    assert reached == leaves
