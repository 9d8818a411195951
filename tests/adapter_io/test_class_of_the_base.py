"""Which class an adapter's base is opened as: by its task, the class in its file, its base."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from tests import tiny
from tests.adapter_io.test_from_pretrained import MODELS
from tests.files import edit
from tests.files.both_ways import quiet
from tests.oracle.adapting import scramble

pytestmark = quiet

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SOUND = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**IMAGE, projection_dim=16)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=vision)
    )


def qwen35() -> nn.Module:
    """A vision-language model; for the task alone transformers would make the text model of it."""
    text = {**TEXT, "head_dim": 8, "max_position_embeddings": 64}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 16,
    }
    text |= {"layer_types": ["full_attention", "full_attention"]}
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config=text, vision_config=vision)
    )


WITHOUT_A_TASK: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "masked words": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "images": MODELS["vision"],
    "speech": MODELS["speech"],
    "vision and language": llava,
    "sound": lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**SOUND)),
}


def based(folder: Path, model: nn.Module) -> Any:
    """Save a model and load it again, so that it knows where it is from."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def pefts(folder: Path, model: nn.Module, **fields: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with PEFT; return its tensors under our names."""
    fields = {"r": 2, "target_modules": r".*\.(q_proj|v_proj|query)"} | fields
    model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    scramble(model)
    model.save_pretrained(folder)
    tensors, _ = edit.read_tensors(folder)
    names = {key: key.removeprefix("base_model.model.") for key in tensors}
    return {names[key].removesuffix(".weight"): t for key, t in tensors.items() if "lora_" in key}


def has(model: nn.Module, values: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return bool(values) and all(torch.equal(state[name], value) for name, value in values.items())


class TestWhatHasNoTask:
    """Our file then says the class, as PEFT's does, and each opens the other's."""

    @pytest.mark.parametrize("kind", WITHOUT_A_TASK)
    def test_pefts_auto_class_opens_our_file(self, tmp_path: Path, kind: str):
        model = based(tmp_path / "base", WITHOUT_A_TASK[kind]())
        hf_lora.wrap(model, targets="all-linear", r=2).save_pretrained(tmp_path / "adapter")
        fields = edit.read_config(tmp_path / "adapter")
        assert "task_type" not in fields
        theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
        assert type(theirs.base_model.model) is type(model)
        assert type(hf_lora.from_pretrained(tmp_path / "adapter")) is type(model)

    @pytest.mark.parametrize("kind", WITHOUT_A_TASK)
    def test_pefts_file_opens_as_the_class_that_it_says(self, tmp_path: Path, kind: str):
        model = based(tmp_path / "base", WITHOUT_A_TASK[kind]())
        values = pefts(tmp_path / "adapter", model)
        again = hf_lora.from_pretrained(tmp_path / "adapter")
        assert type(again) is type(model)
        assert has(again, values)

    def test_a_class_derived_from_one_of_transformers_is_named_as_that(self, tmp_path: Path):
        class Mine(hf.BertModel):
            pass

        based(tmp_path / "base", hf.BertModel(hf.BertConfig(**BERT)))
        model = hf_lora.wrap(Mine.from_pretrained(tmp_path / "base"), r=2)
        model.save_pretrained(tmp_path / "adapter")
        assert edit.read_config(tmp_path / "adapter")["auto_mapping"] == {
            "base_model_class": "BertModel",
            "parent_library": "transformers.models.bert.modeling_bert",
        }

    def test_a_model_of_another_library_has_none(self, tmp_path: Path):
        hf_lora.save(hf_lora.wrap(nn.Sequential(nn.Linear(4, 4)), r=2), tmp_path)
        assert "auto_mapping" not in edit.read_config(tmp_path)

    def test_what_pefts_file_says_of_such_a_class_is_kept_while_it_is_true(self, tmp_path: Path):
        theirs = peft.get_peft_model(
            tiny.Net(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        theirs.save_pretrained(tmp_path / "theirs")
        said = edit.read_config(tmp_path / "theirs")["auto_mapping"]
        assert said == {"base_model_class": "Net", "parent_library": "tests.tiny"}
        hf_lora.save(hf_lora.load(tiny.Net(), tmp_path / "theirs"), tmp_path / "ours")
        assert edit.read_config(tmp_path / "ours")["auto_mapping"] == said
        edit.change_config(tmp_path / "theirs", auto_mapping=said | {"parent_library": "os"})
        hf_lora.save(hf_lora.load(tiny.Net(), tmp_path / "theirs"), tmp_path / "other")
        assert "auto_mapping" not in edit.read_config(tmp_path / "other")


class TestATaskWithoutAClass:
    """PEFT's words are for text: where one has no class for a base, the base's own is taken."""

    @pytest.mark.parametrize(
        ("make", "task"),
        [
            (llava, "CAUSAL_LM"),
            (qwen35, "CAUSAL_LM"),
            (MODELS["speech"], "SEQ_2_SEQ_LM"),
            (MODELS["vision"], "SEQ_CLS"),
            (WITHOUT_A_TASK["sound"], "SEQ_CLS"),
        ],
        ids=["llava", "qwen3.5", "whisper", "vit", "wav2vec2"],
    )
    def test_it_opens_as_what_it_was(self, tmp_path: Path, make: Any, task: str):
        model = based(tmp_path / "base", make())
        values = pefts(tmp_path / "adapter", model, task_type=task)
        again = hf_lora.from_pretrained(tmp_path / "adapter")
        assert type(again) is type(model)
        assert has(again, values)

    @pytest.mark.parametrize("task", ["NOISE", None])
    def test_neither_task_nor_class_is_the_class_of_the_base(self, tmp_path: Path, task: Any):
        model = based(tmp_path / "base", MODELS["vision"]())
        values = pefts(tmp_path / "adapter", model)
        edit.change_config(tmp_path / "adapter", auto_mapping=..., task_type=task)
        assert has(hf_lora.from_pretrained(tmp_path / "adapter"), values)


HEADLESS = {
    "image": (hf.ViTModel, hf.ViTConfig(**IMAGE), hf.ViTForImageClassification, ["classifier"]),
    "sound": (
        hf.Wav2Vec2Model,
        hf.Wav2Vec2Config(**SOUND),
        hf.Wav2Vec2ForSequenceClassification,
        ["projector", "classifier"],
    ),
}


class TestAHeadOnAHeadlessBase:
    @pytest.mark.parametrize("kind", HEADLESS)
    @pytest.mark.parametrize("maker", ["ours", "pefts", "pefts with a task"])
    def test_it_comes_back(self, tmp_path: Path, kind: str, maker: str):
        bare, config, whole, head = HEADLESS[kind]
        bare(config).save_pretrained(tmp_path / "base")
        model = whole.from_pretrained(tmp_path / "base", num_labels=3)
        if maker == "ours":
            hf_lora.wrap(model, r=2, train=head)
            scramble(model)
            hf_lora.save(model, tmp_path / "adapter")
        else:
            task = "SEQ_CLS" if maker == "pefts with a task" else None
            pefts(tmp_path / "adapter", model, modules_to_save=head, task_type=task)
        again = hf_lora.from_pretrained(tmp_path / "adapter", num_labels=3)
        assert type(again) is whole

    def test_the_error_says_how_where_nothing_tells(self, tmp_path: Path):
        bare, config, whole, head = HEADLESS["image"]
        bare(config).save_pretrained(tmp_path / "base")
        model = whole.from_pretrained(tmp_path / "base", num_labels=3)
        pefts(tmp_path / "adapter", model, modules_to_save=head)
        edit.change_config(tmp_path / "adapter", auto_mapping=...)
        with pytest.raises(hf_lora.AdapterMismatchError, match=r"ViTModel .*model_class="):
            hf_lora.from_pretrained(tmp_path / "adapter")
        again = hf_lora.from_pretrained(tmp_path / "adapter", model_class=whole, num_labels=3)
        assert type(again) is whole


class TestAStrangersClass:
    """What a file names is looked up in transformers; nothing is imported for it."""

    @pytest.mark.parametrize(
        "mapping",
        [
            {"base_model_class": "Popen", "parent_library": "antigravity"},
            {"base_model_class": "Trainer", "parent_library": "transformers"},
            {"base_model_class": "T5Model", "parent_library": "transformers"},
            {"base_model_class": "__class__", "parent_library": "transformers"},
            {"base_model_class": ["ViTModel"]},
            {"parent_library": "antigravity"},
            ["ViTModel"],
            "ViTModel",
            3,
        ],
    )
    def test_what_is_no_class_for_the_base_is_passed_over(self, tmp_path: Path, mapping: Any):
        model = based(tmp_path / "base", MODELS["vision"]())
        values = pefts(tmp_path / "adapter", model)
        edit.change_config(tmp_path / "adapter", auto_mapping=mapping)
        assert has(hf_lora.from_pretrained(tmp_path / "adapter"), values)
        assert "antigravity" not in sys.modules


class TestSavedAgain:
    """What a file says that it is for stays what it says."""

    @pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
    def test_an_encoder(self, tmp_path: Path, task: str | None):
        model = based(tmp_path / "base", WITHOUT_A_TASK["encoder"]())
        pefts(tmp_path / "adapter", model, task_type=task)
        hf_lora.save(hf_lora.from_pretrained(tmp_path / "adapter"), tmp_path / "again")
        assert edit.read_config(tmp_path / "again").get("task_type") == task
        auto = peft.AutoPeftModelForFeatureExtraction if task else peft.AutoPeftModel
        assert type(auto.from_pretrained(tmp_path / "again").base_model.model) is hf.BertModel

    def test_a_language_model_without_a_task(self, tmp_path: Path):
        """PEFT's AutoPeftModel opens it by its class, and would not with a task."""
        pefts(tmp_path / "adapter", based(tmp_path / "base", MODELS["causal"]()))
        hf_lora.save(hf_lora.from_pretrained(tmp_path / "adapter"), tmp_path / "again")
        peft.AutoPeftModel.from_pretrained(tmp_path / "again")

    def test_a_minimal_file_gains_a_task(self, tmp_path: Path):
        pefts(tmp_path / "adapter", based(tmp_path / "base", MODELS["causal"]()))
        edit.change_config(tmp_path / "adapter", auto_mapping=..., task_type=...)
        hf_lora.save(hf_lora.from_pretrained(tmp_path / "adapter"), tmp_path / "again")
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again")

    def test_the_revision_of_the_base(self, tmp_path: Path):
        base = str(tmp_path / "base")
        pefts(tmp_path / "adapter", based(tmp_path / "base", MODELS["causal"]()))
        edit.change_config(tmp_path / "adapter", revision="v2")
        model = hf_lora.from_pretrained(tmp_path / "adapter")
        hf_lora.save(model, tmp_path / "again")
        fields = edit.read_config(tmp_path / "again")
        assert (fields["base_model_name_or_path"], fields["revision"]) == (base, "v2")
        model.config._name_or_path = "someone/else"
        hf_lora.save(model, tmp_path / "moved")
        assert "revision" not in edit.read_config(tmp_path / "moved")
