"""Our file in PEFT and PEFT's file in ours: equal outputs, gradients and merged weights."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import hf_lora
from tests.oracle.adapting import (
    PLAIN,
    TOLERANCE,
    backward,
    distance,
    logits,
    our_fields,
    our_gradients,
    peft_config,
    peft_gradients,
    scramble,
)
from tests.oracle.architectures import (
    ARCHITECTURES,
    Architecture,
    each_architecture,
    each_with_head,
)
from tests.rounding import assert_rounded_alike

# One with nn.Linear and one with the transposed Conv1D.
two_kinds = pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.name in ("llama", "gpt2")], ids=lambda a: a.name
)


def save_ours(architecture: Architecture, directory: Path, **fields) -> torch.Tensor:
    """Write an adapter with hf_lora and return what the model answered with it."""
    model, inputs = architecture.build(), architecture.inputs()
    plain = logits(model, inputs)
    hf_lora.wrap(model, **our_fields(architecture, **fields))
    scramble(model)
    model.save_pretrained(directory)
    answers = logits(model, inputs)
    assert distance(answers, plain) > PLAIN
    return answers


def save_pefts(architecture: Architecture, directory: Path, **fields) -> torch.Tensor:
    """Write an adapter with PEFT and return what the model answered with it."""
    model, inputs = architecture.build(), architecture.inputs()
    plain = logits(model, inputs)
    model = peft.get_peft_model(model, peft_config(architecture, **fields)).eval()
    scramble(model)
    model.save_pretrained(directory)
    answers = logits(model, inputs)
    assert distance(answers, plain) > PLAIN
    return answers


def open_pefts(
    architecture: Architecture, directory: Path, trainable: bool = False
) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(
        architecture.build(), directory, is_trainable=trainable
    ).eval()


@each_architecture
def test_our_file_in_peft(architecture: Architecture, tmp_path: Path) -> None:
    expected = save_ours(architecture, tmp_path)
    theirs = open_pefts(architecture, tmp_path)
    assert distance(logits(theirs, architecture.inputs()), expected) < TOLERANCE


@each_architecture
def test_pefts_file_in_ours(architecture: Architecture, tmp_path: Path) -> None:
    expected = save_pefts(architecture, tmp_path)
    ours = hf_lora.load(architecture.build(), tmp_path)
    assert distance(logits(ours, architecture.inputs()), expected) < TOLERANCE


@each_architecture
def test_a_file_that_went_through_peft_comes_back_bit_for_bit(
    architecture: Architecture, tmp_path: Path
) -> None:
    expected = save_ours(architecture, tmp_path / "ours")
    open_pefts(architecture, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    model = hf_lora.load(architecture.build(), tmp_path / "theirs")
    model.save_pretrained(tmp_path / "again")

    first = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    last = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert torch.equal(logits(model, architecture.inputs()), expected)


@each_architecture
def test_gradients_are_pefts(architecture: Architecture, tmp_path: Path) -> None:
    save_pefts(architecture, tmp_path)
    ours = hf_lora.load(architecture.build(), tmp_path, trainable=True)
    theirs = open_pefts(architecture, tmp_path, trainable=True)
    compare_gradients(ours, theirs, architecture)


@each_architecture
def test_the_merged_weights_are_pefts(architecture: Architecture, tmp_path: Path) -> None:
    expected = save_ours(architecture, tmp_path)
    ours = hf_lora.merge_and_unwrap(hf_lora.load(architecture.build(), tmp_path))
    theirs = open_pefts(architecture, tmp_path).merge_and_unload()
    assert distance(logits(ours, architecture.inputs()), expected) < TOLERANCE
    merged = theirs.state_dict()
    assert merged.keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert distance(value.float(), merged[key].float()) < TOLERANCE, key


@each_with_head
def test_our_fresh_head_in_peft(architecture: Architecture, tmp_path: Path) -> None:
    expected = save_ours(architecture, tmp_path, head=True)
    without_head = save_ours(architecture, tmp_path / "headless")
    assert distance(expected, without_head) > PLAIN
    theirs = open_pefts(architecture, tmp_path)
    assert distance(logits(theirs, architecture.inputs()), expected) < TOLERANCE


@each_with_head
def test_pefts_fresh_head_in_ours(architecture: Architecture, tmp_path: Path) -> None:
    expected = save_pefts(architecture, tmp_path, head=True)
    without_head = save_pefts(architecture, tmp_path / "headless")
    assert distance(expected, without_head) > PLAIN
    ours = hf_lora.load(architecture.build(), tmp_path)
    assert distance(logits(ours, architecture.inputs()), expected) < TOLERANCE


@each_with_head
def test_gradients_of_a_fresh_head_are_pefts(architecture: Architecture, tmp_path: Path) -> None:
    save_ours(architecture, tmp_path, head=True)
    ours = hf_lora.load(architecture.build(), tmp_path, trainable=True)
    theirs = open_pefts(architecture, tmp_path, trainable=True)
    compare_gradients(ours, theirs, architecture)
    originals = (p for p in ours.parameters() if not p.requires_grad)
    assert all(original.grad is None for original in originals)


@two_kinds
def test_rank_stabilized_scaling_both_ways(architecture: Architecture, tmp_path: Path) -> None:
    expected = save_ours(architecture, tmp_path / "ours", rslora=True)
    theirs = open_pefts(architecture, tmp_path / "ours")
    assert distance(logits(theirs, architecture.inputs()), expected) < TOLERANCE

    expected = save_pefts(architecture, tmp_path / "theirs", use_rslora=True)
    ours = hf_lora.load(architecture.build(), tmp_path / "theirs")
    assert distance(logits(ours, architecture.inputs()), expected) < TOLERANCE


@two_kinds
def test_pefts_all_linear_in_ours(architecture: Architecture, tmp_path: Path) -> None:
    expected = save_pefts(architecture, tmp_path, target_modules="all-linear")
    ours = hf_lora.load(architecture.build(), tmp_path)
    assert distance(logits(ours, architecture.inputs()), expected) < TOLERANCE


def compare_gradients(
    ours: torch.nn.Module, theirs: peft.PeftModel, architecture: Architecture
) -> None:
    exact, inputs = copy.deepcopy(ours).double(), architecture.inputs()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for model, given in ((ours, inputs), (theirs, inputs), (exact, wide)):
        backward(model, given)
    actual, expected, right = our_gradients(ours), peft_gradients(theirs), our_gradients(exact)
    assert actual.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert_rounded_alike(*((actual[key], expected[key], right[key]) for key in actual))
