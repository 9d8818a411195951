"""Heads, tied and resized embeddings, several adapters, odd names: our files and PEFT's."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from tests.files import edit
from tests.files.both_ways import (
    BERT,
    LLAMA,
    both_ways,
    ours_answers,
    peft_answers,
    pefts,
    quiet,
)
from tests.files.refusing import refuse
from tests.oracle.adapting import PLAIN, TOLERANCE, distance, logits, scramble
from tests.oracle.architectures import Architecture

pytestmark = quiet


class TestTaskHeads:
    """Tasks for which PEFT names modules that it trains in full, by itself."""

    def test_a_classifier(self, tmp_path: Path):
        """modules_to_save then names `classifier` and `score`; this model has one of them."""
        expected = pefts(tmp_path, BERT, target_modules=["query"], task_type="SEQ_CLS")
        assert set(edit.read_config(tmp_path)["modules_to_save"]) == {"classifier", "score"}
        both_ways(tmp_path, expected, BERT)
        assert edit.read_config(tmp_path / "again")["task_type"] == "SEQ_CLS"

    def test_a_classifier_whose_head_is_frozen(self, tmp_path: Path):
        """PEFT's class for the task would look for the head in the file: the task is left out."""
        model = hf_lora.wrap(BERT.build(), targets=["query"], r=2)
        scramble(model)
        hf_lora.save(model, tmp_path)
        assert "task_type" not in edit.read_config(tmp_path)
        expected = logits(model, BERT.inputs())
        assert distance(peft_answers(tmp_path, BERT), expected) < TOLERANCE

    def test_a_head_whose_name_is_the_end_of_another(self, tmp_path: Path):
        """For PEFT `classifier` means DistilBERT's `pre_classifier` as well."""
        config = hf.DistilBertConfig(
            **{"vocab_size": 96, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
            **{"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
            num_labels=3,
        )
        distil = Architecture(
            name="distilbert",
            build=lambda: seeded(hf.DistilBertForSequenceClassification, config),
            inputs=BERT.inputs,
            targets=("q_lin",),
            exception="",
        )
        model = hf_lora.wrap(distil.build(), targets=["q_lin"], r=2, train=["classifier"])
        scramble(model)
        expected = logits(model, distil.inputs())
        hf_lora.save(model, tmp_path / "ours")
        assert distance(peft_answers(tmp_path / "ours", distil), expected) < TOLERANCE
        assert torch.equal(ours_answers(tmp_path / "ours", distil), expected)
        assert hf_lora.adapters(hf_lora.load(distil.build(), tmp_path / "ours"))

        theirs = pefts(tmp_path / "theirs", distil, target_modules=["q_lin"], task_type="SEQ_CLS")
        both_ways(tmp_path / "theirs", theirs, distil)

    def test_answers_to_questions(self, tmp_path: Path):

        def build() -> nn.Module:
            config = BERT.build().config
            config.num_labels = 2
            return seeded(hf.BertForQuestionAnswering, config)

        model = hf_lora.wrap(build(), targets=["query"], r=2, train=["qa_outputs"])
        scramble(model)
        hf_lora.save(model, tmp_path)
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
        assert type(theirs) is peft.PeftModelForQuestionAnswering
        inputs = BERT.inputs()
        with torch.no_grad():
            assert distance(theirs(**inputs).start_logits, model(**inputs).start_logits) < TOLERANCE


def seeded(model_class: Any, config: Any) -> nn.Module:
    torch.manual_seed(5)
    return model_class(config).eval()


def tied() -> nn.Module:
    config = LLAMA.build().config
    config.tie_word_embeddings = True
    return seeded(hf.LlamaForCausalLM, config)


class TestHead:
    """LoRA on the output head: PEFT then writes the base's own weights into the file as well."""

    @pytest.mark.parametrize("build", [LLAMA.build, tied], ids=["untied", "tied"])
    def test_the_bases_weight_is_left_out_and_told(self, tmp_path: Path, build: Any):
        expected = pefts(tmp_path, build=build, target_modules=["q_proj", "lm_head"])
        extra = "base_model.model.lm_head.base_layer.weight"
        assert extra in edit.read_tensors(tmp_path)[0]
        with pytest.warns(hf_lora.HfLoRAWarning, match="only repeats the base's own weight"):
            model = hf_lora.load(build(), tmp_path)
        assert distance(logits(model, LLAMA.inputs()), expected) < TOLERANCE
        hf_lora.save(model, tmp_path / "again")
        assert not [key for key in edit.read_tensors(tmp_path / "again")[0] if "base_layer" in key]
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "again").eval()
        assert distance(logits(theirs, LLAMA.inputs()), expected) < TOLERANCE

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_base_in_another_type_still_has_it(self, tmp_path: Path, dtype: torch.dtype):
        pefts(tmp_path, target_modules=["q_proj", "lm_head"])
        with pytest.warns(hf_lora.HfLoRAWarning, match="only repeats"):
            hf_lora.load(LLAMA.build().to(dtype), tmp_path)

    def test_another_weight_there_is_refused(self, tmp_path: Path):
        """One row of many may be a token that was added and trained: no tolerance hides it."""
        pefts(tmp_path, target_modules=["q_proj", "lm_head"])
        model = LLAMA.build()
        with torch.no_grad():
            model.lm_head.weight[7, 3] += 1e-6
        refuse(tmp_path, "lm_head.base_layer.weight", "not what the base has there", model=model)

    def test_embeddings_of_a_resized_model(self, tmp_path: Path):
        """PEFT saves both embeddings in full when tokens were added before training."""
        base = tmp_path / "base"
        LLAMA.build().save_pretrained(base)
        grown = hf.LlamaForCausalLM.from_pretrained(base)
        torch.manual_seed(1)
        grown.resize_token_embeddings(100)
        model = peft.get_peft_model(grown, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
        scramble(model)
        model.save_pretrained(tmp_path / "adapter")
        keys = edit.read_tensors(tmp_path / "adapter")[0]
        assert {key for key in keys if "lora" not in key} == {
            "base_model.model.lm_head.weight",
            "base_model.model.model.embed_tokens.weight",
        }
        refuse(
            tmp_path / "adapter",
            "lm_head.weight: shape (100, 32), in the model (96, 32)",
            model=LLAMA.build(),
        )
        other = LLAMA.build()
        torch.manual_seed(2)
        other.resize_token_embeddings(100)
        refuse(tmp_path / "adapter", "were tokens added?", model=other)
        same = LLAMA.build()
        torch.manual_seed(1)
        same.resize_token_embeddings(100)
        with pytest.warns(hf_lora.HfLoRAWarning, match="only repeats"):
            ours = hf_lora.load(same, tmp_path / "adapter")
        expected = logits(model, LLAMA.inputs())
        assert distance(logits(ours, LLAMA.inputs()), expected) < TOLERANCE


class TestSeveral:
    """Adapters that are not called `default` lie in folders of their names."""

    def test_pefts_in_ours(self, tmp_path: Path):
        model = peft.get_peft_model(
            LLAMA.build(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="fr"
        ).eval()
        model.add_adapter("de", peft.LoraConfig(r=3, lora_alpha=9, target_modules=["v_proj"]))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        model.save_pretrained(tmp_path)
        ours = hf_lora.load(LLAMA.build(), tmp_path, subfolder="fr", adapter="fr")
        hf_lora.load(ours, tmp_path, subfolder="de", adapter="de")
        for name in ("fr", "de"):
            model.set_adapter(name)
            hf_lora.activate(ours, name)
            expected = logits(model, LLAMA.inputs())
            assert distance(logits(ours, LLAMA.inputs()), expected) < TOLERANCE

    def test_ours_in_peft(self, tmp_path: Path):
        model = hf_lora.wrap(LLAMA.build(), targets=["q_proj"], r=2, adapter="fr")
        hf_lora.add_adapter(model, "default", targets=["v_proj"], r=3)
        scramble(model)
        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [edit.CONFIG, edit.WEIGHTS, "fr"]
        theirs = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path).eval()
        theirs.load_adapter(tmp_path / "fr", "fr")
        for name in ("default", "fr"):
            theirs.set_adapter(name)
            hf_lora.activate(model, name)
            expected = logits(model, LLAMA.inputs())
            assert distance(logits(theirs, LLAMA.inputs()), expected) < TOLERANCE

    def test_one_that_is_called_otherwise(self, tmp_path: Path):
        expected = pefts(tmp_path, adapter="my-adapter_2", target_modules=["q_proj"])
        assert distance(ours_answers(tmp_path / "my-adapter_2"), expected) < TOLERANCE


class TestNames:
    """Names of modules that PEFT's notation can take for others."""

    @staticmethod
    def nested() -> nn.Module:
        """One path is the tail of another, and one name is full of special characters."""

        def block() -> nn.Module:
            return nn.ModuleDict({"q": nn.Linear(8, 8), "k+v (x)": nn.Linear(8, 8)})

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(4)
                self.q = nn.Linear(8, 8)
                self.inner = block()
                self.classifier = nn.Linear(8, 8)
                self.pre_classifier = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.inner["q"](torch.tanh(self.q(x)))
                x = torch.tanh(self.pre_classifier(self.inner["k+v (x)"](x)))
                return self.classifier(x)

        return Outer()

    @pytest.mark.parametrize(
        "fields",
        [
            {"targets": [r"^q"]},
            {"targets": [r"inner\.q"]},
            {"targets": ["q"], "overrides": {r"inner\.q": {"r": 3, "alpha": 9.0}}},
            {"targets": ["q"], "overrides": {r"^q": {"r": 3, "alpha": 9.0}}},
            {"targets": [r"k\+v \(x\)", "q"], "overrides": {r"k\+v \(x\)": {"r": 1, "alpha": 1.0}}},
            {"targets": [r"k\+v \(x\)"]},
            {"targets": [r"^q"], "train": [r"^classifier"]},
            {"targets": ["q"], "train": [r"inner.k\+v \(x\)"]},
        ],
        ids=range(8),
    )
    def test_ours_in_peft(self, tmp_path: Path, fields: dict[str, Any]):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        model = hf_lora.wrap(self.nested(), **{"r": 2, "alpha": 4.0} | fields)
        scramble(model)
        hf_lora.save(model, tmp_path)
        with torch.no_grad():
            expected = model(x)
            theirs = peft.PeftModel.from_pretrained(self.nested(), tmp_path).eval()
            assert distance(theirs(x), expected) < TOLERANCE
            assert distance(self.nested()(x), expected) > PLAIN
            ours = hf_lora.load(self.nested(), tmp_path)
            assert torch.equal(ours(x), expected)
            # and as if PEFT had written it: the JSON alone says what is meant
            edit.as_pefts(tmp_path)
            assert torch.equal(hf_lora.load(self.nested(), tmp_path)(x), expected)

    def test_patterns_stay_in_order(self, tmp_path: Path):
        """PEFT takes the first that fits; sorted by name, `q` would come before `inner.q`."""
        model = hf_lora.wrap(
            self.nested(), ["q"], r=2, overrides={r"inner\.q": {"r": 3}, "^q": {"r": 4}}
        )
        hf_lora.save(model, tmp_path)
        text = (tmp_path / edit.CONFIG).read_text()
        assert list(json.loads(text)["rank_pattern"]) in (["inner.q", "q"], ["inner.q"], ["q"])
        peft.PeftModel.from_pretrained(self.nested(), tmp_path)
