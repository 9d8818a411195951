"""Two adapters of different layers and ranks, alone and added up, as PEFT adds them up."""

from pathlib import Path

import peft
import torch
from torch import nn

import hf_lora
from tests.oracle.adapting import (
    PLAIN,
    TOLERANCE,
    distance,
    logits,
    our_fields,
    peft_config,
    scramble,
)
from tests.oracle.architectures import Architecture, each_architecture

R_OF_FR, ALPHA_OF_FR = 2, 6.0


def second_targets(architecture: Architecture) -> list[str]:
    """Return fewer layers than the first adapter has, in another order."""
    return list(reversed(architecture.targets))[: max(1, len(architecture.targets) // 2)]


def ours(architecture: Architecture) -> nn.Module:
    """Wrap the model with adapters de and fr."""
    model = hf_lora.wrap(architecture.build(), adapter="de", **our_fields(architecture))
    hf_lora.add_adapter(model, "fr", second_targets(architecture), r=R_OF_FR, alpha=ALPHA_OF_FR)
    scramble(model)
    return model


def pefts(architecture: Architecture) -> peft.PeftModel:
    """Give the model adapters de and fr with PEFT."""
    model = peft.get_peft_model(architecture.build(), peft_config(architecture), adapter_name="de")
    second = peft.LoraConfig(
        target_modules=second_targets(architecture), r=R_OF_FR, lora_alpha=ALPHA_OF_FR
    )
    model.add_adapter("fr", second)
    model.base_model.set_adapter(["de", "fr"])  # makes both trainable
    scramble(model)
    return model.eval()


def compare(ours: nn.Module, theirs: peft.PeftModel, architecture: Architecture) -> None:
    inputs = architecture.inputs()
    answers = []
    for names in (["de"], ["fr"], ["de", "fr"]):
        hf_lora.activate(ours, names)
        theirs.base_model.set_adapter(names)
        answers.append(logits(ours, inputs))
        assert distance(answers[-1], logits(theirs, inputs)) < TOLERANCE, names
    alone_de, alone_fr, both = answers
    assert distance(both, alone_de) > PLAIN
    assert distance(both, alone_fr) > PLAIN


@each_architecture
def test_our_two_in_peft(architecture: Architecture, tmp_path: Path) -> None:
    model = ours(architecture)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        architecture.build(), tmp_path / "de", adapter_name="de"
    ).eval()
    theirs.load_adapter(tmp_path / "fr", adapter_name="fr")
    compare(model, theirs, architecture)


@each_architecture
def test_pefts_two_in_ours(architecture: Architecture, tmp_path: Path) -> None:
    theirs = pefts(architecture)
    theirs.save_pretrained(tmp_path)
    model = hf_lora.load(architecture.build(), tmp_path / "de", adapter="de")
    hf_lora.load(model, tmp_path, subfolder="fr", adapter="fr")
    compare(model, theirs, architecture)


@each_architecture
def test_two_merged_in_one_go_are_two_added_up(architecture: Architecture) -> None:
    model, inputs = ours(architecture), architecture.inputs()
    hf_lora.activate(model, ["de", "fr"])
    expected = logits(model, inputs)
    hf_lora.merge(model)
    assert distance(logits(model, inputs), expected) < TOLERANCE
    hf_lora.unmerge(model)
    assert torch.equal(logits(model, inputs), expected)
