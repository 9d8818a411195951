"""The verdict on who else can use an adapter: true for each client, in the plan."""

from typing import Any

import peft
import pytest
import transformers as hf
from torch import nn

import hf_lora
from tests.files.wild import TEXT, llava
from tests.oracle.architectures import ARCHITECTURES

BY_NAME = {architecture.name: architecture.build for architecture in ARCHITECTURES}
LLAMA = BY_NAME["llama"]


def tied() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=True))


def plan(build: Any = LLAMA, targets: Any = "q_proj", **fields: Any) -> hf_lora.Plan:
    return hf_lora.plan(build(), targets, **{"r": 8} | fields)


class TestVLLM:
    @pytest.mark.parametrize(("r", "asked"), [(1, 1), (2, 8), (8, 8), (12, 16), (24, 32), (32, 32)])
    def test_it_is_started_with_a_rank_that_it_takes(self, r: int, asked: int):
        found = plan(r=r)
        assert not found.vllm
        assert f"vLLM can serve it, started with --max-lora-rank {asked} or more" in str(found)

    @pytest.mark.parametrize(("r", "asked"), [(257, 320), (321, 512)])
    def test_large_ranks(self, r: int, asked: int):
        config = hf.LlamaConfig(**TEXT | {"hidden_size": 1024, "intermediate_size": 1024})
        found = plan(lambda: hf.LlamaForCausalLM(config), "up_proj", r=r)
        assert f"--max-lora-rank {asked} or more" in str(found)
        (reason,) = plan(lambda: hf.LlamaForCausalLM(config), "up_proj", r=513).vllm
        assert reason == "its highest rank is 512, here 513"

    def test_a_reason_is_given_once(self):
        (reason,) = plan(train=[".*layernorm"]).vllm
        assert reason.endswith("here model.layers.0.input_layernorm and 3 more")

    def test_a_head_of_a_classifier_is_served(self):
        def build() -> nn.Module:
            return hf.LlamaForSequenceClassification(hf.LlamaConfig(**TEXT))

        assert not plan(build, train=["score"]).vllm

    @pytest.mark.parametrize(
        ("build", "name"),
        [
            (lambda: nn.Sequential(nn.Linear(16, 16)), "Sequential"),
            *((BY_NAME[name], None) for name in ("t5", "bert", "vit", "gpt2", "whisper")),
            (lambda: LLAMA().model, "LlamaModel"),
        ],
    )
    def test_what_it_gives_no_adapters_to(self, build: Any, name: str | None):
        (reason, *_) = plan(build, "all-linear", r=2).vllm
        assert reason.startswith(f"{name or type(build()).__name__} is none of the architectures")

    def test_a_class_of_ones_own_derived_from_one_that_it_knows(self):
        class Mine(hf.LlamaForCausalLM):
            pass

        assert not plan(lambda: Mine(hf.LlamaConfig(**TEXT))).vllm

    def test_what_lies_beside_the_language_model(self):
        build = llava().build
        assert not plan(build, r".*language_model.*q_proj").vllm
        (reason,) = plan(build, "q_proj").vllm
        assert "here model.vision_tower.encoder.layers.0.self_attn.q_proj and 1 more" in reason

    def test_no_layer_at_all(self):
        assert plan(targets="nothing").vllm == ("there is no adapted layer",)
        assert plan(targets="nothing").llama_cpp == ("there is no adapted layer",)


class TestLlamaCpp:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"r": 1, "rslora": True},
            {"overrides": {"layers.0.self_attn.q_proj": {"r": 4}}},
            {"targets": "all-linear"},
        ],
    )
    def test_what_its_own_converter_reads_as_well(self, fields: dict[str, Any]):
        found = plan(**fields)
        assert not found.llama_cpp
        assert 'llama.cpp can use it, exported: hf_lora.export(..., client="llama.cpp")' in str(
            found
        )
        assert "convert_lora" not in str(found)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"rslora": True}, "here of model.layers.0.self_attn.q_proj and 1 more"),
            ({"overrides": {"layers.0.self_attn.q_proj": {"alpha": 3.0}}}, "here of model.layers"),
            (
                {"targets": ["q_proj", "v_proj"], "overrides": {"v_proj": {"r": 4, "alpha": 16.0}}},
                "here of model.layers.0.self_attn.q_proj and 1 more",
            ),
        ],
    )
    def test_what_its_own_converter_scales_otherwise(self, fields: dict[str, Any], words: str):
        found = plan(**fields)
        assert not found.llama_cpp
        line = next(line for line in str(found).splitlines() if line.startswith("llama.cpp"))
        assert "reads neither rsLoRA nor other alphas" in line
        assert words in line

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"train": ["norm"]}, "modules trained in full, here model.norm"),
            ({"train": ["lm_head"]}, "modules trained in full, here lm_head"),
        ],
    )
    def test_what_it_cannot_do(self, fields: dict[str, Any], words: str):
        (reason,) = plan(**fields).llama_cpp
        assert words in reason

    def test_a_head_that_is_tied(self):
        (reason,) = plan(tied, ["lm_head"]).llama_cpp
        assert reason == "it refuses layers that share a weight, here lm_head"
        assert not plan(LLAMA, ["lm_head"]).llama_cpp

    def test_transposed_layers(self):
        assert not plan(BY_NAME["gpt2"], "c_attn").llama_cpp


def test_saving_says_nothing_of_it(tmp_path):
    model = hf_lora.wrap(LLAMA(), "q_proj", r=4, rslora=True, train=["norm"])
    hf_lora.save(model, tmp_path)  # warnings are errors here


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("targets", ["q_proj", "all-linear"])
def test_the_plan_of_pefts_wrapper_says_what_it_is(mixed: bool, targets: str):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(LLAMA(), config, mixed=mixed)
    found = hf_lora.plan(model, targets, r=2)
    (problem,) = found.problems
    assert problem.startswith(f"this is PEFT's {type(model).__name__} around a model")
    assert "model.merge_and_unload()" in problem
    assert not found.targets
    assert not found.left_out
    assert f"PROBLEM: {problem}" in str(found)
    with pytest.raises(hf_lora.TargetError, match="this is PEFT's"):
        hf_lora.wrap(model, targets, r=2)
