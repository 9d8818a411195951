"""What hf_lora uses of diffusers that is not its public face is there, and does what it did."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_base
from safetensors.torch import save_file

from hf_lora.compat import diffusers


def test_the_header_has_the_configuration_under_this_name():
    assert lora_base.LORA_ADAPTER_METADATA_KEY == diffusers.METADATA


def test_tensors_and_configuration_are_fetched_together(tmp_path: Path):
    said = {diffusers.METADATA: json.dumps({"r": 2})}
    save_file({"a.lora_A.weight": torch.ones(2)}, tmp_path / lora_base.LORA_WEIGHT_NAME_SAFE, said)
    tensors, fields = diffusers.fetched(tmp_path, {})
    assert list(tensors) == ["a.lora_A.weight"]
    assert fields == {"r": 2}


def test_a_pickle_is_not_read(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / lora_base.LORA_WEIGHT_NAME)
    with pytest.raises(OSError, match="pytorch_lora_weights"):
        diffusers.fetched(tmp_path, {})


def test_an_argument_that_it_does_not_take_is_named():
    with pytest.raises(TypeError, match="no argument weigth_name"):
        diffusers.fetched(".", {"weigth_name": "x"})


def test_older_names_are_put_into_pefts():
    older = {"a.lora.down.weight": torch.ones(1, 2), "a.lora.up.weight": torch.ones(2, 1)}
    assert set(diffusers.as_peft(older)) == {"a.lora_A.weight", "a.lora_B.weight"}
