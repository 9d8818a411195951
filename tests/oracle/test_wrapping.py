"""Wrapping, merging and unwrapping each architecture: what may change, and what may not."""

import torch
from torch import nn

import hf_lora
from tests.oracle.adapting import (
    EXCEPTION,
    PLAIN,
    TOLERANCE,
    R,
    backward,
    distance,
    logits,
    our_fields,
    scramble,
)
from tests.oracle.architectures import Architecture, each_architecture
from tests.oracle.tree import Tree


def half_frozen(architecture: Architecture) -> nn.Module:
    """Build the model with every second parameter frozen by its owner already."""
    model = architecture.build()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def fields(architecture: Architecture) -> dict:
    """Return the arguments of wrap, with a head to train where there is one."""
    return our_fields(architecture, head=architecture.head is not None)


@each_architecture
def test_the_wrapped_model_begins_as_the_model_it_was(architecture: Architecture) -> None:
    model, inputs = architecture.build(), architecture.inputs()
    expected = logits(model, inputs)
    hf_lora.wrap(model, **fields(architecture))
    assert torch.equal(logits(model, inputs), expected)


@each_architecture
def test_wrapping_adds_and_changes_nothing_else(architecture: Architecture) -> None:
    model = half_frozen(architecture)
    parameters, before = dict(model.named_parameters()), Tree.of(model)
    classes = {path: type(module) for path, module in model.named_modules()}
    assert hf_lora.wrap(model, **fields(architecture)) is model

    after = dict(model.named_parameters())
    added = after.keys() - parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert {name.rsplit(".", 1)[-1].split("_")[0] for name in added} == {"lora"}
    assert [key for key in model.state_dict() if key not in added] == before.keys
    assert before.same_values(model)
    assert {path for path, _ in model.named_modules()} == classes.keys()
    assert all(isinstance(model.get_submodule(path), cls) for path, cls in classes.items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


@each_architecture
def test_unwrapping_gives_back_the_same_tree(architecture: Architecture) -> None:
    model, inputs = half_frozen(architecture), architecture.inputs()
    expected, before = logits(model, inputs), Tree.of(model)
    config = model.config.to_dict()
    hf_lora.wrap(model, **fields(architecture))
    # used in every way in between: trained, a second adapter, merged and left so
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(2):  # in the first step A's gradient is zero, because B is
        optimizer.zero_grad()
        backward(model, inputs)
        optimizer.step()
    model.eval()
    assert distance(logits(model, inputs), expected) > PLAIN
    hf_lora.add_adapter(model, "second", targets=list(architecture.targets[:1]), r=2)
    hf_lora.activate(model, ["default", "second"])
    hf_lora.merge(model)
    assert hf_lora.unwrap(model) is model

    assert Tree.of(model) == before
    assert before.same_values(model)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, inputs), expected)


@each_architecture
def test_merged_answers_are_the_unmerged_ones(architecture: Architecture) -> None:
    model, inputs = architecture.build(), architecture.inputs()
    plain = logits(model, inputs)
    hf_lora.wrap(model, **fields(architecture))
    scramble(model)
    before = Tree.of(model)
    expected = logits(model, inputs)
    assert distance(expected, plain) > PLAIN

    hf_lora.merge(model)
    assert distance(logits(model, inputs), expected) < TOLERANCE
    hf_lora.unmerge(model)
    assert Tree.of(model) == before
    assert before.same_values(model)
    assert torch.equal(logits(model, inputs), expected)
    with hf_lora.no_adapter(model):
        assert torch.equal(logits(model, inputs), plain)


@each_architecture
def test_merged_for_good_is_a_plain_model(architecture: Architecture) -> None:
    model, inputs = architecture.build(), architecture.inputs()
    names, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    hf_lora.wrap(model, **fields(architecture))
    scramble(model)
    expected = logits(model, inputs)
    hf_lora.merge_and_unwrap(model)

    assert distance(logits(model, inputs), expected) < TOLERANCE
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == classes


@each_architecture
def test_the_plan_needs_no_weights_and_is_what_wrap_does(architecture: Architecture) -> None:
    model = architecture.build()
    plan = hf_lora.plan(model, **fields(architecture))
    with torch.device("meta"):
        empty = architecture.build()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert hf_lora.plan(empty, **fields(architecture)) == plan
    assert str(hf_lora.plan(empty, **fields(architecture))) == str(plan)

    hf_lora.wrap(model, **fields(architecture))
    patched = {
        path: module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.Parameter)
    }
    assert [target.path for target in plan.targets] == list(patched)
    for target in plan.targets:
        layer = patched[target.path]
        assert layer.lora_A.shape == (target.slot.r, target.in_features)
        assert layer.lora_B.shape == (target.out_features, target.slot.r)
        assert (layer.r, layer.alpha) == (target.slot.r, target.slot.alpha)
        assert layer.lora_A.dtype == layer.lora_B.dtype == target.dtype
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parameters == trained
    assert {target.slot.r for target in plan.targets} == {R, EXCEPTION["r"]}
