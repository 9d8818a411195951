"""The model card as text: what it tells, for which model, and by what it is known again."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hf_lora
from hf_lora.files.read import read_folder
from hf_lora.hub.card.card import Training, adapter_card, folder_card, is_untouched
from hf_lora.hub.errors import what_is_there
from hf_lora.model.registry import registry_of

TIED = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


def llama(**lora: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return hf_lora.wrap(LlamaForCausalLM(config), **{"targets": ["q_proj", "v_proj"], **lora})


def bert(labels: list[str], **lora: Any) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        id2label=dict(enumerate(labels)),
    )
    return hf_lora.wrap(BertForSequenceClassification(config), "query", r=2, **lora)


def card(model: nn.Module, base: str | None = "me/base", **fields: Any) -> str:
    registry = registry_of(model)
    names = list(registry.adapters)
    return adapter_card(model, registry, names, base=base, repo_id="me/mine", **fields)


def row(text: str, head: str) -> str | None:
    found = re.search(rf"^\| {re.escape(head)} \| (.*) \|$", text, re.MULTILINE)
    return found and found[1]


class TestNumbers:
    def test_one_rank(self):
        text = card(llama(r=4, alpha=8))
        assert row(text, "Targets") == "`q_proj` (2), `v_proj` (2)"
        assert row(text, "Rank") == "4"
        assert row(text, "Alpha") == "8"
        assert row(text, "Updates scaled by") == "2"
        assert row(text, "Dropout in training") is None
        assert row(text, "Parameters") == f"{4 * 4 * 2 * 16:,}"
        assert row(text, "Size") == "2.0 KiB, float32"

    def test_a_rank_for_each_kind_of_layer(self):
        text = card(llama(r=4, alpha=8, overrides={"v_proj": {"r": 2}}))
        assert row(text, "Rank") == "2 on `v_proj`; 4 on `q_proj`"
        assert row(text, "Updates scaled by") == "2 on `q_proj`; 4 on `v_proj`"

    def test_ranks_that_follow_no_kind(self):
        text = card(llama(r=4, alpha=8, overrides={r"layers\.0\.self_attn\.v_proj": {"r": 2}}))
        assert row(text, "Rank") == "2 to 4"

    def test_rslora_and_dropout(self):
        text = card(llama(r=4, alpha=8, rslora=True, dropout=0.05))
        assert row(text, "Updates scaled by") == "4 (rsLoRA)"
        assert row(text, "Dropout in training") == "0.05"

    def test_the_size_is_that_of_what_is_saved(self, tmp_path: Path):
        model = llama(r=4)
        hf_lora.save(model, tmp_path, dtype="bfloat16")
        (adapter,) = hf_lora.summary(model).adapters
        assert row(card(model, dtype=torch.bfloat16), "Size") == "1.0 KiB, bfloat16"
        assert read_folder(tmp_path).file.path.stat().st_size > adapter.bytes // 2

    def test_a_head_in_full_counts(self):
        plain = bert(["a", "b"])
        full = bert(["a", "b"], train=["classifier"])
        text = card(full)
        (one,), (two,) = hf_lora.summary(plain).adapters, hf_lora.summary(full).adapters
        assert row(text, "Trained in full") == "`classifier`"
        assert row(text, "Parameters") == f"{two.parameters:,}"
        assert two.parameters - one.parameters == 2 * 16 + 2


class TestLabels:
    def test_names_that_somebody_gave(self):
        text = card(bert(["yes", 'so "so"'], train=["classifier"]))
        assert """id2label={0: "yes", 1: "so \\"so\\""},\n""" in text

    def test_names_that_nobody_gave(self):
        assert "num_labels=2" in card(bert(["LABEL_0", "LABEL_1"], train=["classifier"]))

    def test_very_many(self):
        text = card(bert([f"kind {n}" for n in range(40)], train=["classifier"]))
        assert "num_labels=40" in text
        assert "kind 7" not in text

    def test_those_of_the_base_are_not_repeated(self):
        text = card(bert(["yes", "no"]))
        assert "label" not in text.split("```python")[1].split("print")[0]


class TestWhatTheModelIs:
    def test_a_class_of_one_s_own_cannot_be_loaded_from_here(self):
        model = hf_lora.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), r=1)
        text = card(model, base=None)
        assert "A LoRA adapter for a Sequential" in text
        assert 'hf_lora.load(model, "me/mine")' in text
        assert "pipeline_tag" not in text
        assert "base_model" not in text

    def test_what_it_is_tagged_with_is_kept(self):
        """As unsloth and others tag the models that they load; the Hub counts PEFT's format."""
        model = llama()
        model.add_model_tags(["made-by-me", "lora"])
        metadata = ModelCard(card(model, training=Training(extra={"tags": ["mine"]}))).data
        assert metadata.tags == ["hf_lora", "lora", "adapter", "made-by-me", "mine"]
        assert metadata.library_name == "peft"

    def test_only_what_can_be_installed_is_told_to_be(self, tmp_path: Path):
        hf_lora.save(model := llama(), tmp_path)
        saved = folder_card({"fr": read_folder(tmp_path)}, "me/mine", base="me/base")
        for text in (card(model), saved):
            assert "pip install hf" not in text
            assert "`pip install peft`" in text
        assert '`PeftModel.from_pretrained(model, "me/mine")`' in card(model)
        assert '`PeftModel.from_pretrained(model, "me/mine", subfolder="fr")`' in saved

    def test_a_bare_layer(self):
        model = hf_lora.wrap(nn.Linear(4, 4), targets=".*", r=1)
        assert row(card(model, base=None), "Targets") == "`the model itself` (1)"

    def test_a_folder_tells_the_same(self, tmp_path: Path):
        """But for what only the model knows: its class, and the types of the tensors."""
        model = llama(r=4, alpha=8, overrides={"v_proj": {"r": 2}}, dropout=0.1)
        hf_lora.save(model, tmp_path)
        live = card(model)
        saved = folder_card({"default": read_folder(tmp_path)}, "me/mine", base="me/base")
        for head in ("Targets", "Rank", "Alpha", "Updates scaled by", "Parameters"):
            assert row(saved, head) == row(live, head), head
        assert (
            saved.split("```python")[1].split("```")[0]
            == (live.split("```python")[1].split("```")[0])
        )
        assert ModelCard(saved).data.to_dict() == ModelCard(live).data.to_dict()

    def test_a_folder_tells_how_many_classes_its_head_has(self, tmp_path: Path):
        hf_lora.save(bert(["a", "b", "c"], train=["classifier"]), tmp_path)
        saved = folder_card({"default": read_folder(tmp_path)}, "me/mine", base="me/base")
        assert "num_labels=3" in saved
        assert "LABEL" not in saved


class TestOtherSoftware:
    def test_what_each_client_makes_of_it(self, tmp_path: Path):
        model = llama(r=4, alpha=8)
        text = card(model)
        assert "- vLLM can serve it, started with --max-lora-rank 8 or more.\n" in text
        assert (
            '- llama.cpp can use it, exported: hf_lora.export(..., client="llama.cpp").\n' in text
        )
        hf_lora.save(model, tmp_path)
        saved = folder_card({"default": read_folder(tmp_path)}, "me/mine", base=None)
        assert "- vLLM can serve it, started with --max-lora-rank 8 or more.\n" in saved
        assert "Where the software takes adapters for this architecture" in saved

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            (
                {"rslora": True},
                "its own convert_lora_to_gguf.py reads neither rsLoRA nor other alphas",
            ),
            ({"train": ["norm"]}, "vLLM cannot serve it: it refuses modules trained in full"),
            ({"train": ["norm"]}, "llama.cpp cannot use it: it drops or refuses"),
        ],
    )
    def test_why_one_cannot(self, tmp_path: Path, fields: dict[str, Any], words: str):
        model = llama(**fields)
        hf_lora.save(model, tmp_path)
        assert words in card(model)
        assert words in folder_card({"default": read_folder(tmp_path)}, "me/mine", base=None)

    def test_a_tied_head(self):
        model = LlamaForCausalLM(LlamaConfig(**TIED))
        hf_lora.wrap(model, "lm_head", r=2)
        assert "it refuses layers that share a weight, here lm_head" in card(model)

    def test_several_adapters_are_told_apart(self):
        model = llama(r=4)
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=4, rslora=True)
        text = card(model)
        assert 'client="llama.cpp").\n' in text
        assert "- `fr`: llama.cpp can use it, exported" in text
        assert "nor other alphas, without a word, here of" in text

    def test_a_model_that_nobody_serves(self):
        text = card(hf_lora.wrap(nn.Sequential(nn.Linear(4, 4)), r=1), base=None)
        assert "- vLLM cannot serve it: Sequential is none of the architectures" in text


class TestTraining:
    def test_everything_that_is_known_is_told(self):
        training = Training(
            title="My model",
            datasets=["me/data"],
            dataset_words="12 examples",
            metrics={"Loss": 0.123456, "Accuracy": 0.75, "Odd": float("nan")},
            hyperparameters={"Rate": 1e-5, "Words": "a | b\nc", "Steps": 12_000},
            extra={"license": "mit", "language": None, "tags": ["lora", "mine"]},
        )
        text = card(llama(), training=training)
        assert "\n# My model\n" in text
        assert "[me/data](https://huggingface.co/datasets/me/data): 12 examples.\n" in text
        assert row(text, "Loss") == "0.1235"
        assert row(text, "Odd") == "nan"
        assert row(text, "Rate") == "1e-05"
        assert row(text, "Words") == r"a \| b c"
        assert row(text, "Steps") == "12000"
        metadata = ModelCard(text).data.to_dict()
        assert metadata["license"] == "mit"
        assert "language" not in metadata
        assert metadata["tags"] == ["hf_lora", "lora", "adapter", "mine"]
        assert metadata["metrics"] == ["accuracy"]
        (index,) = metadata["model-index"]
        (result,) = index["results"]
        assert result["dataset"] == {"type": "me/data", "name": "me/data"}
        assert result["metrics"] == [{"type": "accuracy", "value": 0.75}]

    def test_results_on_unknown_data_are_not_listed_as_a_ranking(self):
        text = card(llama(), training=Training(metrics={"Accuracy": 0.75}))
        assert "model-index" not in text
        assert row(text, "Accuracy") == "0.75"

    def test_nothing_known_leaves_no_empty_headlines(self):
        text = card(llama())
        assert re.findall(r"^#+ (.*)", text, re.MULTILINE) == [
            "mine",
            "Use it",
            "The adapter",
            "In other software",
        ]
        assert "nformation" not in text


class TestTheSeal:
    def test_it_knows_its_own_card(self):
        text = card(llama())
        assert is_untouched(text)
        assert is_untouched(text.replace("\n", "\r\n")), "as an editor on Windows saves it"
        assert is_untouched(text + "\n\n")

    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text.replace("# mine", "# Mine"),
            lambda text: text.replace("- lora\n", ""),
            lambda text: text + "More words.\n",
            lambda text: text.split("<!--")[0],
            lambda text: "",
            lambda text: "# Mine\n\n<!-- hf_lora 0123456789abcdef -->\n",
        ],
    )
    def test_it_knows_what_is_not(self, change: Any):
        assert not is_untouched(change(card(llama())))

    def test_equal_models_have_equal_cards(self):
        assert card(llama()) == card(llama())
        assert card(llama(r=2)) != card(llama(r=4))


def test_what_a_repo_holds_is_said_in_a_sentence():
    def words(*files: str, subfolder: str | None = None) -> str:
        return what_is_there("me/x", subfolder, "adapter_config.json", files)

    weights = "adapter_model.safetensors"
    assert "pass subfolder= one of: 'a', 'b/c'" in words(f"a/{weights}", f"b/c/{weights}")
    assert "a pickle" in words("adapter_config.json", "adapter_model.bin", f"a/{weights}")
    assert "It has: 'README.md'" in words("README.md")
    assert words("a/x", subfolder="a").startswith("me/x/a has no adapter_config.json")
    assert "It has: 'x'." in words("a/x", "y", subfolder="a")
    assert "It has: nothing" in words()
