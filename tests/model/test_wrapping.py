"""Wrapping as a whole: what it refuses, and what may be done to a model afterwards."""

import copy
import gc
import io
import weakref
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaForCausalLM

import hf_lora
from hf_lora import StateError, TargetError
from hf_lora.model.registry import registry_of
from tests.model.models import TOKENS, llama
from tests.snapshot import snapshot
from tests.tiny import Net, answers, rows, scramble

Q = "q_proj"


def test_a_second_wrap_is_refused_and_says_what_to_do():
    model = hf_lora.wrap(Net(), Q, r=2)
    before = snapshot(model)
    with pytest.raises(StateError, match=r"wrapped already; use hf_lora\.add_adapter"):
        hf_lora.wrap(model, Q, r=2)
    assert snapshot(model) == before
    hf_lora.unwrap(model)
    with pytest.raises(StateError, match="not wrapped"):
        hf_lora.unwrap(model)
    hf_lora.wrap(model, Q, r=2)


def test_a_part_and_the_whole_are_not_wrapped_apart():
    model = Net()
    hf_lora.wrap(model.layers[0], Q, r=2)
    before = snapshot(model)
    with pytest.raises(StateError, match=r"layers\.0\.q_proj carries an adapter already"):
        hf_lora.wrap(model, Q, r=2)
    with pytest.raises(StateError, match="carries an adapter already"):
        hf_lora.wrap(model, "v_proj", r=2, adapter="other")
    assert snapshot(model) == before
    hf_lora.unwrap(model.layers[0])

    hf_lora.wrap(model, Q, r=2)
    with pytest.raises(StateError, match="q_proj carries an adapter already"):
        hf_lora.wrap(model.layers[1], "v_proj", r=2)
    with pytest.raises(StateError, match="This layer carries an adapter already"):
        hf_lora.wrap(model.layers[1].q_proj, ".*", r=2)

    seeds = nn.Sequential(hf_lora.LoRALinear(nn.Linear(4, 4), 2))
    with pytest.raises(StateError, match="0 carries an adapter already"):
        hf_lora.wrap(seeds, "0", r=2)


def test_what_goes_around_a_model_goes_around_after_wrapping(tmp_path: Path):
    for outside in (nn.DataParallel(Net()), torch.compile(Net(), backend="eager")):
        with pytest.raises(StateError, match="wrap the model first"):
            hf_lora.wrap(outside, Q, r=2)  # type: ignore[type-var]
    inner = hf_lora.wrap(Net(), Q, r=2)
    scramble(inner)
    for outside in (nn.DataParallel(inner), torch.compile(inner, backend="eager")):
        assert torch.equal(answers(outside), answers(inner))  # type: ignore[arg-type]
        assert hf_lora.adapters(outside) == hf_lora.adapters(inner)  # type: ignore[arg-type]
        with hf_lora.no_adapter(outside):  # type: ignore[arg-type]
            assert torch.equal(answers(inner), answers(Net()))
    assert hf_lora.unwrap(torch.compile(inner, backend="eager")) is inner  # type: ignore[arg-type]


def test_what_is_no_model_is_said():
    for wrong in ("gpt2", None, nn.Linear):
        with pytest.raises(StateError, match=r"Only an nn\.Module can be wrapped"):
            hf_lora.wrap(wrong, Q)  # type: ignore[type-var]


@pytest.mark.parametrize("targets", [Q, "all-linear", ".*", "base_layer"])
def test_a_layer_with_an_adapter_of_peft_is_refused(targets: str):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = snapshot(model)
    plan = hf_lora.plan(model.base_model.model, targets, r=2)
    assert not any("q_proj" in target.path for target in plan.targets)
    assert any("another library's adapter" in reason for reason in plan.left_out.values())
    if not plan.targets:
        with pytest.raises(TargetError, match="another library's adapter"):
            hf_lora.wrap(model.base_model.model, targets, r=2)
    assert snapshot(model) == before


def test_a_model_whose_only_child_is_called_module_is_just_a_model():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)

    model = hf_lora.wrap(Holder(), "module", r=2)
    assert isinstance(model.module, hf_lora.LoRALinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_takes_the_adapter_along(dtype: torch.dtype):
    model = hf_lora.wrap(Net(), Q, r=2)
    scramble(model)
    expected = answers(model)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = model(rows().to(dtype))
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected, rtol=0.1, atol=0.1)
    model.float()
    hf_lora.unwrap(model)
    assert type(model.layers[0].q_proj) is nn.Linear


def test_moving_to_meta_and_back_is_told_before_a_save_of_nothing():
    model = hf_lora.wrap(Net(), Q, r=2)
    model.to("meta")
    with pytest.raises(StateError, match="had its adapter offloaded with it"):
        hf_lora.merge(model)


def test_transformers_does_not_initialize_the_adapter_again():
    model = hf_lora.wrap(llama(), Q, r=4, train=["norm"])
    scramble(model)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.init_weights()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_base_of_custom_code_is_not_initialized_again_because_of_the_adapter():
    """Such code writes in place; transformers spares a module only if all it holds is marked."""

    class Custom(LlamaForCausalLM):
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.data.fill_(7.0)

    model = Custom(llama().config)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # as from_pretrained marks what it has loaded
    hf_lora.wrap(model, Q, r=4, train=["embed_tokens"])
    scramble(model)
    before = snapshot(model)
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.embed_tokens):
        layer.__dict__.pop("_is_hf_initialized", None)
        model._initialize_weights(layer, is_custom_code=True)
    assert snapshot(model).parameters == before.parameters


def test_tie_weights_after_wrapping_keeps_head_and_adapter():
    model = hf_lora.wrap(llama(tied=True), "lm_head", r=4)
    scramble(model)
    before = model(TOKENS).logits
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(TOKENS).logits, before)


def test_generate_and_gradient_checkpointing():
    model = hf_lora.wrap(llama(), r=4)
    scramble(model)
    tokens = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    logits = model(tokens[:, :-1]).logits
    assert torch.equal(tokens[0, 6:], logits[0, 5:].argmax(-1))
    gradients = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.zero_grad()
        if kwargs:
            model.activation_checkpointing_enable(kwargs)
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.activation_checkpointing_disable()
    for other in gradients[1:]:
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[0], other, strict=True)
        )


def test_what_is_made_in_inference_mode_can_be_trained():
    model = Net()
    with torch.inference_mode():
        hf_lora.wrap(model, Q, r=2, train=["head"])
        hf_lora.add_adapter(model, "b", "v_proj", r=2)
    hf_lora.activate(model, ["default", "b"])
    model(rows()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_pickle_is_loaded_in_a_fresh_registry_of_its_own():
    model = hf_lora.wrap(Net(), Q, r=2, train=["head"])
    hf_lora.add_adapter(model, "b", [Q, "v_proj"], r=1)
    hf_lora.activate(model, ["default", "b"])
    scramble(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(answers(twin), answers(model))
    assert type(twin.layers[0].q_proj) is type(model.layers[0].q_proj)
    hf_lora.merge(twin)
    hf_lora.unmerge(twin)
    with hf_lora.no_adapter(twin):
        assert torch.equal(answers(twin), answers(Net()))
    assert hf_lora.active_adapters(model) == ("default", "b")
    hf_lora.unwrap(twin)
    assert type(twin.head) is nn.Linear


def test_a_copy_of_a_merged_model_unmerges_on_its_own():
    model = hf_lora.wrap(llama(tied=True), "lm_head", r=4)
    scramble(model)
    hf_lora.merge(model)
    twin = copy.deepcopy(model)
    hf_lora.unmerge(twin)
    assert twin.config.tie_word_embeddings
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    hf_lora.unmerge(model)
    assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)


def test_pruning_after_wrapping_is_seen_by_the_forward_and_refused_by_the_merge():
    model = hf_lora.wrap(Net(), Q, r=2)
    scramble(model)
    layer = model.layers[0].q_proj
    prune.random_unstructured(layer, "weight", 0.5)
    x = torch.randn(3, 8)
    update = x @ layer.lora_delta("default").T
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias + update, atol=1e-5)
    with pytest.raises(TargetError, match="computes its weight from other tensors"):
        hf_lora.merge(model)
    hf_lora.unwrap(model)
    prune.remove(model.layers[0].q_proj, "weight")
    assert type(model.layers[0].q_proj) is nn.Linear


def test_nothing_keeps_a_model_alive():
    model = hf_lora.wrap(Net(), Q, r=2, train=["head"])
    hf_lora.merge(model)
    hf_lora.unmerge(model)
    answers(model)
    seen = weakref.ref(model.layers[0].q_proj.lora_A)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert seen() is None


def test_the_registry_is_an_attribute_of_the_model():
    model = hf_lora.wrap(Net(), Q, r=2)
    assert registry_of(model) in vars(model).values()
    hf_lora.unwrap(model)
    assert vars(model).keys() == vars(Net()).keys()
