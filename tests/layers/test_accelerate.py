"""Models that accelerate has placed: hooks before wrapping or after, taken off, offloaded."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from torch import nn
from transformers import LlamaForCausalLM

import hf_lora
from hf_lora import StateError, TargetError
from tests.model.models import TOKENS, llama
from tests.rounding import assert_rounded_alike
from tests.snapshot import digest, snapshot
from tests.tiny import Net, answers, rows, scramble

TARGETS = ["q_proj", "v_proj"]
CPU = torch.device("cpu")


def wrap(model: nn.Module) -> nn.Module:
    """Wrap the model with an adapter that says something."""
    hf_lora.wrap(model, targets=TARGETS, r=2, alpha=4.0)
    scramble(model)
    return model


def expected() -> torch.Tensor:
    """Return the answer of the same adapter on the same model without any hook."""
    return answers(wrap(Net()))


def place(model: nn.Module) -> nn.Module:
    """Let accelerate place every module on the CPU, with hooks that offload nothing."""
    dispatch_model(model, {"layers.0": "cpu", "layers.1": "cpu", "head": "cpu"}, force_hooks=True)
    assert model.layers[0].q_proj._hf_hook is not None
    return model


def offload(model: nn.Module) -> nn.Module:
    """Let accelerate keep every weight elsewhere between calls."""
    cpu_offload(model, execution_device=CPU)
    assert model.layers[0].q_proj.weight.is_meta
    return model


def chain(model: nn.Module) -> nn.Module:
    """Put two hooks on every layer, the second of which offloads."""
    for block in model.layers:
        for layer in (block.q_proj, block.v_proj):
            add_hook_to_module(layer, ModelHook())
            add_hook_to_module(layer, AlignDevicesHook(CPU, offload=True), append=True)
    return model


def removed(model: nn.Module) -> nn.Module:
    """Put hooks on and take them off again; accelerate leaves a forward on each instance."""
    remove_hook_from_submodules(place(model))
    assert "forward" in vars(model.layers[0].q_proj)
    return model


BEFORE = [place, offload, chain, removed]


@pytest.mark.parametrize("prepare", BEFORE)
def test_hooked_before_wrapping(prepare: Callable[[nn.Module], nn.Module]):
    model = prepare(Net())
    base = answers(model)
    before = snapshot(model) if prepare is not offload and prepare is not chain else None
    wrap(model)
    assert torch.equal(answers(model), expected())
    with hf_lora.no_adapter(model):
        assert torch.equal(answers(model), base)
    layer, x = model.layers[0].q_proj, rows()
    assert torch.equal(layer.base(x), Net().layers[0].q_proj(x))

    hf_lora.unwrap(model)
    assert torch.equal(answers(model), base)
    if before is not None:
        after = snapshot(model)
        assert after.modules == before.modules
        assert after.parameters == before.parameters
        assert after.keys == before.keys
    remove_hook_from_submodules(model)
    assert torch.equal(answers(model), base)
    assert type(model.layers[0].q_proj) is nn.Linear


@pytest.mark.parametrize("prepare", BEFORE)
def test_hooked_layers_train(prepare: Callable[[nn.Module], nn.Module]):
    model = wrap(prepare(Net()))
    plain = wrap(Net())
    for each in (model, plain):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(rows()).square().sum().backward()
            optimizer.step()
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(answers(model), answers(plain))


def test_hooked_after_wrapping_and_unhooked():
    model = place(wrap(Net()))
    base = answers(Net())
    assert torch.equal(answers(model), expected())
    hf_lora.add_adapter(model, "b", targets="q_proj", r=3)
    hf_lora.delete_adapter(model, "b")
    remove_hook_from_submodules(model)
    assert torch.equal(answers(model), expected())
    hf_lora.unwrap(model)
    assert torch.equal(answers(model), base)

    model = place(wrap(Net()))
    hf_lora.unwrap(model)
    assert torch.equal(answers(model), base)
    remove_hook_from_submodules(model)
    assert torch.equal(answers(model), base)


def test_offloaded_from_disk_saves_and_loads(tmp_path: Path):
    plain = wrap(Net())
    hf_lora.save(plain, tmp_path / "adapter")
    model = Net()
    disk_offload(model, tmp_path / "base", execution_device=CPU)
    hf_lora.load(model, tmp_path / "adapter")
    assert torch.equal(answers(model), answers(plain))
    hf_lora.save(model, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()

    other = Net(seed=1)
    disk_offload(other, tmp_path / "other", execution_device=CPU)
    with pytest.raises(hf_lora.BaseMismatchError):
        hf_lora.load(other, tmp_path / "adapter")


def test_the_adapters_parameters_stay_the_same_objects_and_in_order():
    model = wrap(offload(Net()))
    layer = model.layers[0].q_proj
    names, before = list(layer._parameters), (layer.lora_A, layer.lora_B)
    answers(model)
    assert list(layer._parameters) == names == ["weight", "bias", "lora_A", "lora_B"]
    assert layer.lora_A is before[0]
    assert layer.lora_B is before[1]
    assert layer.weight.is_meta


def test_an_offloaded_model_is_copied():
    model = wrap(offload(Net()))
    twin = copy.deepcopy(model)
    assert torch.equal(answers(twin), answers(model))
    with torch.no_grad():
        twin.layers[0].q_proj.lora_B.zero_()
    assert not torch.equal(answers(twin), answers(model))


def test_what_offloading_leaves_no_room_for_is_refused():
    whole = Net()
    cpu_offload(whole, execution_device=CPU, preload_module_classes=["Block"])
    with pytest.raises(StateError, match="together with a module above"):
        hf_lora.wrap(whole, targets=TARGETS, r=2)
    assert torch.equal(answers(whole), answers(Net()))


def test_a_custom_forward_under_a_hook_is_refused():
    model = Net()
    layer = model.layers[0].q_proj
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1
    place(model)
    with pytest.raises(TargetError, match="replaced on the instance"):
        hf_lora.wrap(model, targets="layers.0.q_proj", r=2)


def test_the_seeds_constructor_on_a_hooked_layer():
    base = nn.Linear(4, 4)
    add_hook_to_module(base, AlignDevicesHook(CPU))
    layer = hf_lora.LoRALinear(base, 2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4)
    assert not torch.equal(layer(x), base(x))
    assert torch.equal(layer.base(x), base(x))
    assert digest(layer.weight) == digest(base.weight)
    add_hook_to_module(offloaded := nn.Linear(4, 4), AlignDevicesHook(CPU, offload=True))
    with pytest.raises(StateError, match="not in memory"):
        hf_lora.LoRALinear(offloaded, 2)


def test_a_model_that_transformers_loads_partly_from_disk(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    plain, exact = hf_lora.wrap(llama(), r=4), hf_lora.wrap(llama().double(), r=4)
    hf_lora.wrap(model, r=4)

    def trained(each: nn.Module, seed: int) -> list[torch.Tensor]:
        scramble(each, seed)
        parameters = [p for p in each.parameters() if p.requires_grad]
        # not Adam, which turns the sign of a rounding error into a step of full size
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            each.train()(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(parameters) == 28
        return [p.detach().clone() for p in parameters]

    models = (model, plain, exact)
    assert_rounded_alike(*(tuple(trained(each, seed) for each in models) for seed in range(4)))
    model.save_pretrained(tmp_path / "adapter")
    again = hf_lora.load(llama(), tmp_path / "adapter").eval()
    found, right = again(TOKENS).logits, copy.deepcopy(again).double()(TOKENS).logits
    assert_rounded_alike((model.eval()(TOKENS).logits, found, right))
    hf_lora.unwrap(model)
    assert torch.equal(model(TOKENS).logits, llama()(TOKENS).logits)


def test_a_placed_module_is_trained_in_full():
    model, plain = place(Net()), Net()
    for each in (model, plain):
        hf_lora.wrap(each, targets="q_proj", r=2, train=["head", r"layers\.1\.norm"])
        scramble(each)
        each(rows()).square().sum().backward()
    assert torch.equal(answers(model), answers(plain))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    hf_lora.unwrap(model)
    assert torch.equal(answers(model), answers(Net()))
