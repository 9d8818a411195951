"""Adapters whose names are not the model's: resolved where it is known how, and told."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import hf_lora
from hf_lora import AdapterMismatchError, HfLoRAWarning
from hf_lora.adapter_io.save import collect, save_state
from hf_lora.model.registry import registry_of
from tests import tiny
from tests.files import edit
from tests.files.refusing import refuse
from tests.oracle.adapting import PLAIN, TOLERANCE, distance, logits, scramble
from tests.oracle.architectures import ARCHITECTURES, Architecture, Inputs

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
WITH_BACKBONE = [BY_NAME[name] for name in ("llama", "gpt2", "bert", "vit", "bart", "t5")]

each_maker = pytest.mark.parametrize("maker", ["ours", "peft"])
each_with_backbone = pytest.mark.parametrize("architecture", WITH_BACKBONE, ids=lambda a: a.name)


def backbone(architecture: Architecture) -> nn.Module:
    """Return the model without its head: of the class that would load it so."""
    model = architecture.build()
    if isinstance(model, hf.T5ForConditionalGeneration):
        bare = hf.T5Model(model.config)
        bare.load_state_dict(model.state_dict(), strict=False)
        return bare.eval()
    return model.base_model


@torch.no_grad()
def hidden(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model(**inputs).last_hidden_state


def save(maker: str, model: nn.Module, folder: Path, targets: list[str] | str) -> nn.Module:
    """Adapt ``model`` with hf_lora or PEFT, save, and return the adapted model."""
    if maker == "ours":
        hf_lora.wrap(model, targets=targets, r=2, alpha=6.0)
        scramble(model)
        hf_lora.save(model, folder)
        return model
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets)
    model = peft.get_peft_model(model, config).eval()
    scramble(model)
    model.save_pretrained(folder)
    return model.base_model.model


def rename_keys(folder: Path, change: Callable[[str], str]) -> None:
    """Rename every tensor, and write the file as PEFT does."""

    def rename(tensors: edit.Tensors) -> None:
        for key in list(tensors):
            tensors[change(key)] = tensors.pop(key)

    edit.change_tensors(folder, rename)


def load_told(model: nn.Module, folder: Path, words: str) -> nn.Module:
    """Load with exactly one warning, which says what was resolved."""
    with pytest.warns(HfLoRAWarning) as told:
        hf_lora.load(model, folder)
    ours = [str(entry.message) for entry in told if entry.category is HfLoRAWarning]
    assert len(ours) == 1
    assert words in ours[0]
    return model


@each_maker
@each_with_backbone
def test_from_the_backbone_to_the_head_model(
    architecture: Architecture, maker: str, tmp_path: Path
):
    adapted = save(maker, backbone(architecture), tmp_path, list(architecture.targets[:2]))
    model, inputs = architecture.build(), architecture.inputs()
    if architecture.name == "t5":  # its head model calls the parts by the same names
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hf_lora.load(model, tmp_path)
        inside = logits(model, inputs)
        assert distance(inside, logits(architecture.build(), inputs)) > PLAIN
        return
    prefix = model.base_model_prefix
    load_told(model, tmp_path, f"trained on the backbone alone: '{prefix}.' was put before")
    found, expected = hidden(model.base_model, inputs), hidden(adapted, inputs)
    assert distance(found, expected) < TOLERANCE
    assert distance(expected, hidden(backbone(architecture), inputs)) > 100 * TOLERANCE


@each_maker
@each_with_backbone
def test_from_the_head_model_to_the_backbone(
    architecture: Architecture, maker: str, tmp_path: Path
):
    adapted = save(maker, architecture.build(), tmp_path, list(architecture.targets[:2]))
    model, inputs = backbone(architecture), architecture.inputs()
    if architecture.name == "t5":
        hf_lora.load(model, tmp_path)
        assert distance(hidden(model, inputs), hidden(backbone(architecture), inputs)) > PLAIN
        return
    load_told(model, tmp_path, f"'{adapted.base_model_prefix}.' was taken off its names")
    found, expected = hidden(model, inputs), hidden(adapted.base_model, inputs)
    assert distance(found, expected) < TOLERANCE


def test_a_pattern_is_read_under_the_names_it_was_written_for(tmp_path: Path):
    """`layers.0...` means nothing on the head model, whose paths begin `model.`."""
    llama = BY_NAME["llama"]
    save("peft", backbone(llama), tmp_path, r"layers\.[01]\.self_attn\.(q|v)_proj")
    load_told(llama.build(), tmp_path, "trained on the backbone alone")
    edit.change_config(tmp_path, target_modules=r"layers\.0\.self_attn\.(q|v)_proj")
    refuse(tmp_path, "model.layers.1.self_attn.q_proj has tensors, but is no", model=llama.build())
    edit.change_config(tmp_path, target_modules=r"layers\.\d\..*_proj")
    refuse(tmp_path, "model.layers.1.mlp.up_proj is a target, but has no", model=llama.build())


def test_a_head_that_the_backbone_does_not_have(tmp_path: Path):
    model = hf_lora.wrap(BY_NAME["bert"].build(), targets=["query"], train=["classifier"])
    hf_lora.save(model, tmp_path)
    backbone = BY_NAME["bert"].build().base_model
    refuse(tmp_path, "the model has no", error=AdapterMismatchError, model=backbone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."), "_orig_mod."),
        (lambda key: f"_orig_mod.{key}", "_orig_mod."),
        (lambda key: f"module.{key}", "module."),
        (lambda key: f"module._orig_mod.{key}", "_orig_mod."),
        (lambda key: key.replace("base_model.model.", "base_model.model.module."), "module."),
        (lambda key: key.replace("layers.", "layers._fsdp_wrapped_module."), "_fsdp_wrapped"),
        (
            lambda key: re.sub(r"(layers\.\d\.)", r"\1_checkpoint_wrapped_module.", key),
            "_checkpoint_wrapped_module.",
        ),
        (lambda key: key.removeprefix("base_model.model."), None),
        (lambda key: key.replace("lora_A.weight", "lora_A.default.weight"), None),
        (lambda key: key.removesuffix(".weight"), None),
    ],
    ids=range(10),
)
def test_what_wrappers_put_into_names(
    tmp_path: Path, change: Callable[[str], str], words: str | None
):
    expected = tiny.saved(tmp_path)
    rename_keys(tmp_path, change)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = hf_lora.load(tiny.Net(), tmp_path)
    assert torch.equal(tiny.answers(model), expected)
    messages = [str(entry.message) for entry in told if entry.category is HfLoRAWarning]
    assert bool(messages) == bool(words)
    assert any((words or "") in message for message in messages) or not words


def test_a_model_that_really_has_such_a_name(tmp_path: Path):
    """A child called `module` is no wrapper, and nothing is taken off its names."""

    def build() -> nn.Module:
        return nn.Sequential(nn.ModuleDict({"module": tiny.Net()}), nn.Linear(8, 8))

    model = hf_lora.wrap(build(), targets=["q_proj"], r=2)
    scramble(model)
    hf_lora.save(model, tmp_path)
    edit.as_pefts(tmp_path)
    hf_lora.load(build(), tmp_path)

    def outer() -> nn.Module:
        return nn.ModuleDict({"module": tiny.Net(), "other": nn.Linear(8, 8)})

    hf_lora.save(hf_lora.wrap(outer(), targets=["q_proj"], r=2), tmp_path / "outer")
    edit.as_pefts(tmp_path / "outer")
    hf_lora.load(outer(), tmp_path / "outer")


@pytest.mark.parametrize("train", [[], ["head"]])
def test_a_model_with_wrappers_inside_saves_the_plain_names(tmp_path: Path, train: list[str]):
    """Regions compiled or checkpointed by themselves: the file fits the model without them."""

    def wrapped() -> nn.Module:
        model = tiny.Net()
        model.layers[1] = checkpoint_wrapper(model.layers[1])
        model.head = checkpoint_wrapper(model.head)
        return model

    model = hf_lora.wrap(wrapped(), targets=["q_proj", "v_proj"], r=2, train=train)
    tiny.scramble(model)
    expected = tiny.answers(model)
    hf_lora.save(model, tmp_path)
    keys = edit.read_tensors(tmp_path)[0]
    assert "base_model.model.layers.1.q_proj.lora_A.weight" in keys
    assert not [key for key in keys if "_checkpoint_wrapped_module" in key]
    for build in (tiny.Net, wrapped):
        for folder in (tmp_path, tmp_path / "pefts"):
            if not folder.exists():
                shutil.copytree(tmp_path, folder)
                edit.as_pefts(folder)
            assert torch.equal(tiny.answers(hf_lora.load(build(), folder)), expected)
    again = hf_lora.load(wrapped(), tmp_path)
    hf_lora.save(again, tmp_path / "again")
    first, second = (folder / edit.WEIGHTS for folder in (tmp_path, tmp_path / "again"))
    assert edit.read_tensors(first.parent)[0].keys() == edit.read_tensors(second.parent)[0].keys()


def old_vit(key: str) -> str:
    """Return a key as transformers 4 named ViT's layers."""
    key = key.replace("vit.layers.", "vit.encoder.layer.")
    key = key.replace(".attention.o_proj.", ".attention.output.dense.")
    for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
        key = key.replace(f".attention.{new}_proj.", f".attention.attention.{old}.")
    key = key.replace(".mlp.fc1.", ".intermediate.dense.")
    return key.replace(".mlp.fc2.", ".output.dense.")


class TestOlderTransformers:
    """Names that transformers itself has changed since the adapter was trained."""

    WORDS = "names of an older transformers were converted"

    @pytest.mark.parametrize(
        ("new", "old"),
        [
            (["q_proj", "v_proj"], ["query", "value"]),
            (["q_proj", "fc2", "o_proj", "fc1"], ["query", "dense"]),
            (["q_proj", "v_proj"], r".*encoder\.layer\.\d+\.attention\.attention\.(query|value)"),
            (["fc1"], ["intermediate.dense"]),
        ],
        ids=range(4),
    )
    def test_vit(self, tmp_path: Path, new: list[str], old: list[str] | str):
        vit = BY_NAME["vit"]
        adapted = save("peft", vit.build(), tmp_path, new)
        rename_keys(tmp_path, old_vit)
        edit.change_config(tmp_path, target_modules=old)
        assert all("proj" not in key for key in edit.read_tensors(tmp_path)[0])
        # a fresh head of the classifier's name has nothing to do with it
        if old == ["query", "dense"]:
            assert len(edit.read_tensors(tmp_path)[0]) == 2 * 2 * 4
        model = load_told(vit.build(), tmp_path, self.WORDS)
        found, expected = logits(model, vit.inputs()), logits(adapted, vit.inputs())
        assert distance(found, expected) < TOLERANCE

    def test_vit_with_its_head(self, tmp_path: Path):
        vit = BY_NAME["vit"]
        model = hf_lora.wrap(vit.build(), targets=["q_proj"], r=2, train=["classifier"])
        scramble(model)
        hf_lora.save(model, tmp_path)
        rename_keys(tmp_path, old_vit)
        edit.change_config(tmp_path, target_modules=["query"])
        again = load_told(vit.build(), tmp_path, self.WORDS)
        assert torch.equal(logits(again, vit.inputs()), logits(model, vit.inputs()))

    def test_the_backbone_of_an_older_vit(self, tmp_path: Path):
        vit = BY_NAME["vit"]
        adapted = save("peft", backbone(vit), tmp_path, ["q_proj"])
        rename_keys(tmp_path, lambda key: old_vit(key.replace("model.layers", "model.vit.layers")))
        rename_keys(tmp_path, lambda key: key.replace("model.vit.", "model."))
        edit.change_config(tmp_path, target_modules=["query"])
        model = vit.build()
        with pytest.warns(HfLoRAWarning, match="converted; trained on the backbone alone"):
            hf_lora.load(model, tmp_path)
        found, expected = hidden(model.base_model, vit.inputs()), hidden(adapted, vit.inputs())
        assert distance(found, expected) < TOLERANCE

    def test_a_layer_that_is_missing_under_its_old_name(self, tmp_path: Path):
        vit = BY_NAME["vit"]
        save("peft", vit.build(), tmp_path, ["q_proj"])
        rename_keys(tmp_path, old_vit)
        edit.change_config(tmp_path, target_modules=["query", "value"])
        refuse(tmp_path, "v_proj is a target, but has no tensors", model=vit.build())

    @pytest.mark.parametrize(
        "targets", [["q_proj"], r"language_model\.model\.layers\.\d+\.self_attn\.q_proj"]
    )
    def test_a_vision_language_model(self, tmp_path: Path, targets: list[str] | str):
        """LLaVA's language model moved one level down, and lost one."""
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes["num_attention_heads"] = 4
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
            text_config=hf.LlamaConfig(**sizes, vocab_size=96, max_position_embeddings=32),
            image_token_index=95,
        )

        def build() -> nn.Module:
            torch.manual_seed(2)
            return hf.LlavaForConditionalGeneration(config).eval()

        adapted = save("peft", build(), tmp_path, r".*language_model.*q_proj")
        rename_keys(
            tmp_path,
            lambda key: key.replace("model.language_model.", "language_model.model.").replace(
                "base_model.language_model", "base_model.model.language_model"
            ),
        )
        assert all("model.language_model.model.layers" in k for k in edit.read_tensors(tmp_path)[0])
        edit.change_config(tmp_path, target_modules=targets)
        inputs = BY_NAME["llama"].inputs()
        if isinstance(targets, list):
            # the vision tower has a q_proj as well, and no tensors in this file
            refuse(tmp_path, "vision_tower", "q_proj is a target, but has no", model=build())
            return
        model = load_told(build(), tmp_path, self.WORDS)
        assert distance(logits(model, inputs), logits(adapted, inputs)) < TOLERANCE


def test_two_names_for_one_place(tmp_path: Path):
    """An old and a new name of the same layer in one file would both be for it."""
    vit = BY_NAME["vit"]
    save("peft", vit.build(), tmp_path, ["q_proj"])

    def double(tensors: edit.Tensors) -> None:
        for key in list(tensors):
            tensors[old_vit(key)] = tensors[key].clone()

    edit.change_tensors(tmp_path, double)
    refuse(tmp_path, "named twice", model=vit.build())


def test_names_that_share_a_beginning_by_chance(tmp_path: Path):
    """Nothing is taken off or put on where the names are the model's own."""
    expected = tiny.saved(tmp_path, targets=[r"layers\.0\.q_proj"])
    edit.as_pefts(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tiny.answers(hf_lora.load(tiny.Net(), tmp_path)), expected)


def test_a_gathered_state_dict_may_have_plain_names(tmp_path: Path):
    """What gathers shards takes the wrappers off the names; the adapter was added inside them."""
    model = tiny.Net()
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    hf_lora.wrap(model, targets=["q_proj", "v_proj"], r=2)
    tiny.scramble(model)
    gathered = {
        key.replace("_checkpoint_wrapped_module.", ""): tensor
        for key, tensor in model.state_dict().items()
    }
    save_state(model, tmp_path, state_dict=gathered)
    assert torch.equal(tiny.answers(hf_lora.load(tiny.Net(), tmp_path)), tiny.answers(model))
    del gathered["layers.1.q_proj.lora_A"]
    with pytest.raises(hf_lora.StateError, match="lacks 1 adapter tensors"):
        save_state(model, tmp_path, state_dict=gathered)


def test_a_layer_and_its_wrapper_have_one_name():
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)))
    registry = registry_of(hf_lora.wrap(model, targets=[r"0\._checkpoint_wrapped_module"], r=2))
    adapter = registry.adapter("default")
    adapter.slots["0"] = adapter.slots["0._checkpoint_wrapped_module"]
    registry.modules["0"] = registry.modules["0._checkpoint_wrapped_module"]
    with pytest.raises(hf_lora.SaveError, match="a file has one name for them"):
        collect(model, registry, "default", None)
