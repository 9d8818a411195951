"""The auto classes on an adapter folder, where peft is installed too.

test_trainer_patch.py does the same in a process that has no peft.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
    pipelines,
)
from transformers.integrations import peft as peft_integration
from transformers.models.auto import auto_factory

import hf_lora
from hf_lora.errors import AdapterFileError, BaseMismatchError
from hf_lora.kinds.lora import LoRALayer
from tests.integrations import training

X = torch.tensor([[3, 5, 7, 9]])


@pytest.fixture
def auto() -> Iterator[None]:
    hf_lora.enable_auto()
    yield
    hf_lora.disable_auto()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter that names its base, a folder; and what the two of them answer."""
    folder = tmp_path_factory.mktemp("auto")
    training.llama(vocab_size=len(training.WORDS), eos_token_id=1).save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    hf_lora.wrap(model, "q_proj", r=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.lora_B.normal_()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model.eval()(X).logits.detach()


def switches() -> list[object]:
    owners = (auto_factory, peft_integration, pipelines)
    return [PreTrainedModel.load_adapter, *(owner.is_peft_available for owner in owners)]


def test_an_auto_class_attaches_the_adapter_through_us(
    auto: None, saved: tuple[Path, torch.Tensor]
):
    folder, expected = saved
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        model = cls.from_pretrained(folder)
        assert type(model) is LlamaForCausalLM
        assert torch.equal(model(X).logits, expected)
        assert isinstance(model.model.layers[0].self_attn.q_proj, LoRALayer)
        assert list(hf_lora.adapters(model)) == ["default"]
        assert not any(p.requires_grad for p in model.parameters())


def test_a_pipeline_does(auto: None, saved: tuple[Path, torch.Tensor]):
    made = pipeline("text-generation", model=str(saved[0]), tokenizer=training.tokenizer())
    assert isinstance(made.model.model.layers[0].self_attn.q_proj, LoRALayer)


def test_it_gets_another_name_if_asked(auto: None, saved: tuple[Path, torch.Tensor]):
    model = AutoModelForCausalLM.from_pretrained(saved[0], adapter_name="fr")
    assert hf_lora.active_adapters(model) == ("fr",)


def test_what_is_known_of_the_load_can_be_asked(auto: None, saved: tuple[Path, torch.Tensor]):
    model, told = AutoModelForCausalLM.from_pretrained(saved[0], output_loading_info=True)
    assert torch.equal(model(X).logits, saved[1])
    assert not any(told.values())


def test_an_option_that_means_nothing_to_us_is_named(auto: None, saved: tuple[Path, torch.Tensor]):
    with pytest.raises(TypeError, match="hotswap"):
        training.llama().load_adapter(str(saved[0]), hotswap=True)


def test_the_base_is_checked(auto: None, saved: tuple[Path, torch.Tensor], tmp_path: Path):
    """A folder that names another base is refused, as by hf_lora.load."""
    training.llama(5, vocab_size=len(training.WORDS)).save_pretrained(tmp_path / "other")
    config = (saved[0] / "adapter_config.json").read_text()
    wrong = tmp_path / "adapter"
    wrong.mkdir()
    old, new = str(saved[0].parent / "base"), str(tmp_path / "other")
    assert old in config
    (wrong / "adapter_config.json").write_text(config.replace(old, new))
    weights = (saved[0] / "adapter_model.safetensors").read_bytes()
    (wrong / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(BaseMismatchError):
        AutoModelForCausalLM.from_pretrained(wrong)
    (wrong / "adapter_model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(AdapterFileError):
        AutoModelForCausalLM.from_pretrained(wrong)


def test_a_plain_model_loads_as_ever(auto: None, saved: tuple[Path, torch.Tensor]):
    model = AutoModelForCausalLM.from_pretrained(saved[0].parent / "base")
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    assert "save_pretrained" not in vars(model)


def test_switching_off_restores_everything(saved: tuple[Path, torch.Tensor]):
    before = switches()
    hf_lora.enable_auto()
    hf_lora.enable_auto()
    assert all(now is not then for now, then in zip(switches(), before, strict=True))
    hf_lora.disable_auto()
    assert all(now is then for now, then in zip(switches(), before, strict=True))
    hf_lora.disable_auto()
    assert all(now is then for now, then in zip(switches(), before, strict=True))
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    assert isinstance(model.model.layers[0].self_attn.q_proj, LoraLayer)  # peft's again
