"""What a base's checkpoint did not fill trains with the adapter, or is told."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import dispatch_model
from torch import nn

import hf_lora
from hf_lora import HfLoRAWarning
from hf_lora.model.registry import registry_of

SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
TEXT = SMALL | {"num_hidden_layers": 2, "vocab_size": 48, "max_position_embeddings": 32}
SPEECH = {
    **SMALL,
    "num_hidden_layers": 1,
    "conv_dim": [8, 8],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}
BASES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT), add_pooling_layer=False),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, pad_token_id=0)),
    "bare llama": lambda: hf.LlamaModel(hf.LlamaConfig(**TEXT, pad_token_id=0)),
    "vit": lambda: hf.ViTModel(
        hf.ViTConfig(**SMALL, num_hidden_layers=1, image_size=16, patch_size=8)
    ),
    "speech": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SPEECH)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each base."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(5)
    for name, build in BASES.items():
        build().save_pretrained(folder / name)
    return folder


class Scorer(hf.PreTrainedModel):
    """Somebody's own model of a task, around a loaded encoder."""

    config_class = hf.BertConfig
    _supports_sdpa = True

    def __init__(self, config: hf.BertConfig, folder: Path):
        super().__init__(config)
        self.encoder = hf.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(32, 2)
        self.post_init()


class Around(nn.Module):
    """A module around a loaded encoder that transformers knows nothing of."""

    def __init__(self, folder: Path):
        super().__init__()
        self.encoder = hf.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = nn.Linear(32, 2)


def auto(task: str, base: str, **fields: Any) -> Callable[[Path], nn.Module]:
    """Return a loader of a base as the model of a task."""
    return lambda folder: getattr(hf, f"AutoModel{task}").from_pretrained(folder / base, **fields)


def resized(base: str) -> Callable[[Path], nn.Module]:
    def load(folder: Path) -> nn.Module:
        model = auto("ForCausalLM", base)(folder)
        model.resize_token_embeddings(56)
        return model

    return load


def unpacked(folder: Path) -> nn.Module:
    """Load a model in 8 bits and take it out of them again: its layers are new objects."""
    packing = hf.BitsAndBytesConfig(load_in_8bit=True)
    model = auto("ForCausalLM", "llama", quantization_config=packing)(folder)
    model.dequantize()
    return model


def rebuilt(folder: Path) -> nn.Module:
    """Put another layer in the place of one, as pruning and fusing do."""
    model = auto("ForCausalLM", "llama")(folder)
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 40, bias=False)
    return model


# name: how to load, what trains by itself, and what is only told
FRESH: dict[str, tuple[Callable[[Path], nn.Module], tuple[str, ...], set[str]]] = {
    "a head": (auto("ForSequenceClassification", "llama"), ("score",), set()),
    "a head in parts": (auto("ForSequenceClassification", "roberta"), ("classifier",), set()),
    "a pooler that the head reads": (
        auto("ForSequenceClassification", "bert"),
        ("bert.pooler", "classifier"),
        set(),
    ),
    "a part of a head": (auto("ForMaskedLM", "bert"), ("cls.predictions.transform",), set()),
    "a head of tokens": (auto("ForTokenClassification", "bert"), ("classifier",), set()),
    "a head of answers": (auto("ForQuestionAnswering", "bert"), ("qa_outputs",), set()),
    "an output embedding": (auto("ForCausalLM", "bare llama"), ("lm_head",), set()),
    "an image head": (auto("ForImageClassification", "vit"), ("classifier",), set()),
    "a projector": (
        auto("ForAudioClassification", "speech"),
        ("projector", "classifier"),
        set(),
    ),
    "a parameter that no module has alone": (
        auto("ForAudioClassification", "speech", mask_time_prob=0.1),
        ("projector", "classifier"),
        {"wav2vec2.masked_spec_embed"},
    ),
    "projections of two towers": (
        lambda folder: hf.VisionTextDualEncoderModel.from_vision_text_pretrained(
            folder / "vit", folder / "roberta"
        ),
        ("text_model.pooler", "visual_projection", "text_projection"),
        set(),
    ),
    "attention to another tower": (
        lambda folder: hf.EncoderDecoderModel.from_encoder_decoder_pretrained(
            folder / "roberta", folder / "bert", encoder_add_pooling_layer=False
        ),
        (
            "decoder.bert.encoder.layer.0.crossattention",
            "decoder.bert.encoder.layer.1.crossattention",
            "decoder.cls.predictions.transform",
        ),
        set(),
    ),
    "a head of one's own": (
        lambda folder: Scorer(hf.BertConfig(**TEXT), folder / "bert"),
        ("head",),
        set(),
    ),
    "a pooler that nobody reads": (auto("", "bert"), (), {"pooler"}),
    "a head outside of transformers": (lambda folder: Around(folder / "bert"), (), {"head"}),
    "a copy, of which nothing is known": (
        lambda folder: copy.deepcopy(auto("ForSequenceClassification", "llama")(folder)),
        (),
        {"score"},
    ),
    "a vocabulary that the checkpoint does not have": (
        auto("ForCausalLM", "llama", vocab_size=56, ignore_mismatched_sizes=True),
        ("model.embed_tokens", "lm_head"),
        set(),
    ),
    "a 4-bit base": (
        auto(
            "ForSequenceClassification",
            "llama",
            quantization_config=hf.BitsAndBytesConfig(load_in_4bit=True),
        ),
        ("score",),
        set(),
    ),
    "nothing": (auto("ForCausalLM", "llama"), (), set()),
    "nothing in a backbone": (auto("", "llama"), (), set()),
    "no checkpoint": (lambda folder: BASES["llama"](), (), set()),
    "a copy of what is full": (
        lambda folder: copy.deepcopy(auto("ForCausalLM", "llama")(folder)),
        (),
        set(),
    ),
    "a resized vocabulary": (resized("llama"), (), set()),
    "a model out of 8 bits": (unpacked, (), set()),
    "a layer that was put in": (rebuilt, (), set()),
}


@pytest.mark.parametrize(("load", "fresh", "told"), FRESH.values(), ids=FRESH.keys())
def test_what_the_checkpoint_lacks_trains_or_is_told(
    bases: Path, load: Callable[[Path], nn.Module], fresh: tuple[str, ...], told: set[str]
):
    """``plan`` says it with names, and ``wrap`` does what it says."""
    model = load(bases)
    targets = ["q_proj", "query"] if hasattr(model, "config") else ["query"]
    here = [t for t in targets if any(n.endswith(t) for n, _ in model.named_modules())]
    plan = hf_lora.plan(model, here, r=2)
    assert plan.problems == ()
    assert plan.fresh == fresh
    assert {item.path for item in plan.trained} == set(fresh)
    assert plan.unfilled.keys() == told
    assert all(name in str(plan) for name in (*fresh, *told))
    if told:
        with pytest.warns(HfLoRAWarning, match="The base's checkpoint does not hold") as caught:
            hf_lora.wrap(model, here, r=2)
        assert all(name in str(caught[0].message) for name in told)
    else:
        hf_lora.wrap(model, here, r=2)
    registry = registry_of(model)
    assert set(registry.adapter("default").trained) == set(fresh)
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert trains == {id(p) for _, p in registry.parameters("default")}
    assert str(hf_lora.plan(hf_lora.unwrap(model), here, r=2)) == str(plan)


def test_naming_modules_adds_to_what_is_fresh_and_an_empty_list_takes_it_away(bases: Path):
    load = auto("ForSequenceClassification", "roberta")
    both = hf_lora.plan(load(bases), ["query"], r=2, train=["LayerNorm"])
    assert both.fresh == ("classifier",)
    assert {item.path for item in both.trained} > {"classifier"}
    inside = hf_lora.plan(load(bases), ["query"], r=2, train=[r"classifier\.dense", "classifier"])
    assert [item.path for item in inside.trained] == ["classifier"]
    none = hf_lora.plan(load(bases), ["query"], r=2, train=())
    assert (none.trained, none.fresh) == ((), ())
    assert none.unfilled == {"classifier": "train=() says so"}
    hf_lora.wrap(load(bases), ["query"], r=2, train=())  # nothing to warn of


def test_a_low_rank_target_that_is_fresh_trains_in_full(bases: Path):
    plan = hf_lora.plan(auto("ForSequenceClassification", "llama")(bases), ["q_proj", "score"], r=1)
    assert plan.left_out["score"] == "trained in full"
    assert plan.fresh == ("score",)


def test_a_second_adapter_has_a_head_of_its_own_unless_another_has_factors_there(bases: Path):
    model = hf_lora.wrap(auto("ForSequenceClassification", "llama")(bases), "q_proj", r=2)
    hf_lora.add_adapter(model, "b", "v_proj", r=2)
    assert registry_of(model).adapter("b").trained == ("score",)
    model = auto("ForSequenceClassification", "llama")(bases)
    hf_lora.wrap(model, ["q_proj", "score"], r=1, train=())
    plan = hf_lora.plan(model, "v_proj", r=2)
    assert plan.unfilled == {"score": "another adapter has a low-rank update there"}


def test_the_head_of_an_offloaded_model_is_told(bases: Path, tmp_path: Path):
    model = auto("ForSequenceClassification", "llama")(bases)
    places = {"model": "cpu", "score": "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert hf_lora.plan(model, "q_proj", r=2).unfilled.keys() == {"score"}


def test_a_configuration_says_whether_anything_is_fresh_or_nothing_is(tmp_path: Path):
    for train in (None, (), ("head",)):
        config = hf_lora.LoRAConfig(train=train)
        assert config.train == train
        config.to_file(tmp_path / "lora.yaml")
        assert hf_lora.LoRAConfig.from_file(tmp_path / "lora.yaml") == config
        assert hf_lora.LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
