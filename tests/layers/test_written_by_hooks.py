"""What hooks write through `.data`: no tensor tells, and gradients are of what was computed."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.functional import composed
from tests.integrations import training
from tests.layers.fused_models import INPUTS, llama, of
from tests.oracle.adapting import scramble
from tests.rounding import assert_rounded_alike


@pytest.fixture(autouse=True)
def _many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed, "FEW_ROWS", 0)


def halve_output(module: nn.Module, args: Any, output: Any) -> None:
    output.data.mul_(0.5)


def halve_input(module: nn.Module, args: Any, *more: Any) -> None:
    args[0].data.mul_(0.5)


def after(name: str, hook: Callable[..., None] = halve_output) -> Callable[[nn.Module], Any]:
    """Return what registers a hook behind the first module of that name."""
    return lambda model: named(model, name).register_forward_hook(hook)


def before(name: str) -> Callable[[nn.Module], Any]:
    return lambda model: named(model, name).register_forward_pre_hook(halve_input)


def everywhere(model: nn.Module) -> Any:
    norms = {m for n, m in model.named_modules() if n.endswith("post_attention_layernorm")}
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, output: halve_output(module, args, output) if module in norms else None
    )


def named(model: nn.Module, name: str) -> nn.Module:
    return next(module for path, module in model.named_modules() if path.endswith(name))


PLACES = {
    "behind a norm": after("0.post_attention_layernorm"),
    "behind an activation": after("0.mlp.act_fn"),
    "before a block": before("0.mlp"),
    "before the second of a group": before("0.self_attn.k_proj"),
    "before the last of a group": before("0.self_attn.v_proj"),
    "behind the first of a group": after("0.self_attn.q_proj", halve_input),
    "behind the second of a group": after("0.self_attn.k_proj", halve_input),
    "on every module": everywhere,
}


@pytest.fixture(params=PLACES.values(), ids=PLACES.keys())
def place(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], Any]]:
    handles = []
    yield lambda model: handles.append(request.param(model))
    for handle in handles:
        handle.remove()


def pefts(model: nn.Module) -> nn.Module:
    """Return PEFT's model with the same base and factors."""
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=r".*_proj")
    theirs = peft.get_peft_model(hf_lora.unwrap(copy.deepcopy(model)), config)
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                plain = name.replace(".default.weight", "").replace("base_model.model.", "")
                parameter.copy_(ours[plain])
    return theirs


def gradients(model: nn.Module) -> list[torch.Tensor]:
    logits = model(**INPUTS).logits
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("when", ["before training", "after two steps"])
def test_gradients_are_pefts(place: Callable[[nn.Module], Any], when: str):
    trials = []
    for seed in range(6):
        model = llama()
        scramble(model, seed)
        theirs, exact = pefts(model), pefts(copy.deepcopy(model).double())
        unedited = gradients(theirs)
        if when == "after two steps":
            for _ in range(2):
                gradients(model)
        for each in (model, theirs, exact):
            place(each)
        found = gradients(model)
        assert not all(map(torch.equal, gradients(theirs), unedited))
        trials.append((found, gradients(theirs), gradients(exact)))
    assert_rounded_alike(*trials)


def test_a_hook_that_is_gone_or_a_library_s_costs_nothing():
    model = llama()
    model.enable_input_require_grads()
    gradients(model)
    hooks = of(model, "0.mlp.down_proj").lora_routing.sharing.hooks
    assert not hooks.any()
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    assert hooks.any()
    handle.remove()
    gradients(model)
    assert not hooks.any()


def test_a_copy_sees_its_own_hooks():
    model = llama()
    gradients(model)
    twin = copy.deepcopy(model)
    twin.model.norm.register_forward_hook(lambda *_: None)
    for each in (model, twin):
        gradients(each)
    hooks = [of(each, "0.mlp.down_proj").lora_routing.sharing.hooks for each in (model, twin)]
    assert [each.any() for each in hooks] == [False, True]


@pytest.mark.parametrize("few", [0, 192])
def test_second_derivatives_are_those_of_the_plain_path(few: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(composed, "FEW_ROWS", few)

    def penalty(model: nn.Module) -> list[torch.Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = model(input_ids=INPUTS["input_ids"], labels=INPUTS["input_ids"]).loss
        first = torch.autograd.grad(loss, trained, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), trained))

    with training.seeded(0):
        base = training.llama(attn_implementation="eager")
    model = hf_lora.wrap(base, "all-linear", r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    for each in (plain, exact):
        of(each, "0.mlp.down_proj").lora_routing.plain = True
    penalty(model)
    assert_rounded_alike((penalty(model), penalty(plain), penalty(exact)))
