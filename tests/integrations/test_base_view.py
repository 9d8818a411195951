"""A view of the base: a model of its own that shares every tensor and has nothing of LoRA."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_lora
from hf_lora.errors import StateError
from hf_lora.layers.kind import Patched
from tests.integrations import training

X = torch.tensor([[3, 5, 7, 9]])


def loud(model: Any) -> Any:
    """Adapters that say something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_copy" in name:
                parameter.add_(0.1)
    return model


def all_tensors(root: Any) -> set[int]:
    """Where the data of every tensor lies that can be reached from an object, however deep."""
    found, seen, left = set(), set(), [root]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, str | int | float | type | types.FunctionType):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor) and each.numel():
            found.add(each.untyped_storage().data_ptr())
        if isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list | tuple | set):
            left += each
        left += vars(each).values() if hasattr(each, "__dict__") else ()
    return found


def test_it_is_the_base(tmp_path: Path):
    base = training.llama().eval()
    expected = base(X).logits
    keys = set(base.state_dict())
    model = loud(hf_lora.wrap(base, r=4, train=["lm_head"]))
    assert not torch.equal(model(X).logits, expected)
    view = hf_lora.base_view(model)
    assert torch.equal(view(X).logits, expected)
    assert type(view) is type(model)
    assert set(view.state_dict()) == keys
    assert not any(isinstance(module, Patched) for module in view.modules())
    assert not view.training
    view.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_every_parameter_is_the_models_own():
    model = loud(training.wrapped())
    view = hf_lora.base_view(model)
    ours = dict(model.named_parameters())
    assert all(parameter is ours[name] for name, parameter in view.named_parameters())
    assert all_tensors(view) < all_tensors(model)


def test_neither_changes_the_other():
    model = loud(training.wrapped(fields={"attention_dropout": 0.1}))
    view = hf_lora.base_view(model)
    model.train()
    assert not any(module.training for module in view.modules())
    hf_lora.unwrap(model)
    model.eval()
    assert torch.equal(view(X).logits, model(X).logits)
    view.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    assert not model.lm_head._forward_hooks


def test_several_adapters():
    model = loud(training.wrapped())
    loud(hf_lora.add_adapter(model, "fr", targets="o_proj", r=2))
    hf_lora.activate(model, ["default", "fr"])
    view = hf_lora.base_view(model)
    with hf_lora.no_adapter(model):
        assert torch.equal(view(X).logits, model.eval()(X).logits)
    assert hf_lora.active_adapters(model) == ("default", "fr")


@pytest.mark.parametrize(
    "bits",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
)
def test_a_quantized_base_is_shared_with_what_its_numbers_mean(tmp_path: Path, bits: dict):
    """Scales and codes lie beside the weight, some of them two objects deep."""
    training.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**bits)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    expected = base(X).logits
    model = loud(hf_lora.wrap(base, r=4))
    assert not torch.equal(model(X).logits, expected)
    view = hf_lora.base_view(model)
    assert all_tensors(view) <= all_tensors(model)
    assert torch.equal(view(X).logits, expected)


def test_a_merged_model_has_no_base_to_view():
    model = hf_lora.merge(loud(training.wrapped()))
    with pytest.raises(StateError, match="Cannot view the base while default is merged"):
        hf_lora.base_view(model)


def test_a_plain_model_has_no_base_to_view():
    with pytest.raises(StateError, match="not wrapped"):
        hf_lora.base_view(training.llama())


def doubled(model: Any) -> Any:
    """A forward as libraries put it on the object: it closes over the one that was there."""
    original = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    return types.MethodType(forward, model)


class Caller:
    """What accelerate puts on a model that trains in 16 bits: an object that keeps its forward."""

    def __init__(self, model: Any):
        self.forward = model.forward

    def __call__(self, *args: Any) -> Any:
        output = self.forward(*args)
        output.logits = output.logits * 2
        return output


def called(model: Any) -> Any:
    caller = Caller(model)
    return types.MethodType(lambda self, *args: caller(*args), model)


@pytest.mark.parametrize("put", [[doubled], [called], [doubled, called, doubled]])
def test_a_forward_on_the_object_that_leads_back_leads_to_the_view(put: list[Any]):
    model = loud(training.wrapped())
    for make in put:
        model.forward = make(model)
    expected = training.llama().eval()(X).logits * 2 ** len(put)
    view = hf_lora.base_view(model)
    assert torch.equal(view(X).logits, expected)
    assert not torch.equal(model.eval()(X).logits, expected)


def test_one_that_cannot_be_led_to_the_view_is_refused():
    model = loud(training.wrapped())
    held = [model]
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, *args: forward(held[0], *args), model)
    with pytest.raises(StateError, match="The forward of this LlamaForCausalLM was replaced by"):
        hf_lora.base_view(model)
    del model.forward
    assert not hasattr(hf_lora.base_view(model).lm_head, "lora_A")


def test_what_trains_in_the_base_itself_is_copied():
    model = training.wrapped().eval()
    model.model.norm.weight.requires_grad_(True)
    expected = model(X).logits
    view = hf_lora.base_view(model)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert torch.equal(view(X).logits, expected)
    assert not any(parameter.requires_grad for parameter in view.parameters())


def test_a_forward_on_the_object_that_is_its_own_is_copied():
    model = loud(training.wrapped()).eval()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs).logits * 2

    model.forward = types.MethodType(forward, model)
    view = hf_lora.base_view(model)
    assert torch.equal(view(X), training.llama().eval()(X).logits * 2)
