"""A layer in two places of a model: a file means the same to PEFT, or there is none."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import AdapterMismatchError, SaveError
from tests import tiny

X = torch.ones(2, 8)


class Twice(nn.Module):
    """``b`` is ``a``; the two blocks are one object as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.c = nn.Linear(8, 8)
        block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, *self.blocks):
            x = torch.tanh(layer(x))
        return self.c(x)


@pytest.mark.parametrize(
    "fields", [{"targets": ["a", "c"]}, {"targets": ["b"]}, {"targets": ["c"], "train": ["a"]}]
)
def test_what_pefts_format_cannot_say_is_refused(tmp_path: Path, fields: dict):
    model = hf_lora.wrap(Twice(), **{"r": 2} | fields)
    with pytest.raises(SaveError, match="a is also b"):
        hf_lora.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_block_that_is_repeated_means_the_same_to_peft(tmp_path: Path):
    """PEFT changes the one block, and so every place of it."""
    model = hf_lora.wrap(Twice(), [r"blocks\.0\.0", "c"], r=2)
    tiny.scramble(model)
    expected = model(X)
    hf_lora.save(model, tmp_path)
    assert torch.equal(hf_lora.load(Twice(), tmp_path)(X), expected)
    theirs = peft.PeftModel.from_pretrained(Twice(), tmp_path)
    torch.testing.assert_close(theirs(X), expected)


def test_pefts_file_of_such_a_layer_is_refused(tmp_path: Path):
    config = peft.LoraConfig(r=2, target_modules=["a", "c"])
    theirs = peft.get_peft_model(Twice(), config)
    tiny.scramble(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="a is also b; PEFT gives"):
        hf_lora.load(Twice(), tmp_path)
