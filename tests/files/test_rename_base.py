"""Naming another base model in files that are there: nothing else about them changes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_lora
from hf_lora.files.read import read_folder
from hf_lora.files.rename_base import copy_with_base
from tests.tiny import Net


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ``me/base``, by hf_lora."""
    model = hf_lora.wrap(Net(), "q_proj", r=2)
    hf_lora.save(model, tmp_path / "adapter")
    copy_with_base(read_folder(tmp_path / "adapter"), tmp_path / "named", "me/base")
    return tmp_path / "named"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("base", ["me/other", None])
def test_json_and_header_agree_on_the_name(folder: Path, tmp_path: Path, base: str | None):
    before = contents(folder)
    copy_with_base(read_folder(folder), tmp_path / "copy", base)
    assert contents(folder) == before
    found = read_folder(tmp_path / "copy")
    assert found.base == base
    assert found.config == read_folder(folder).config
    assert not any(b"me/base" in content for content in contents(tmp_path / "copy").values())
    (tmp_path / "copy" / "adapter_config.json").unlink()
    assert read_folder(tmp_path / "copy").base == base, "the header has it all"
    names = list(found.file.shapes)
    there, here = (dict(read_folder(f).file.read(names)) for f in (folder, tmp_path / "copy"))
    assert all(torch.equal(there[name], here[name]) for name in names)


def test_in_place(folder: Path):
    copy_with_base(read_folder(folder), folder, "me/other")
    assert read_folder(folder).base == "me/other"
    assert set(contents(folder)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_same_name_copies_the_same_bytes(folder: Path, tmp_path: Path):
    copy_with_base(read_folder(folder), tmp_path / "copy", "me/base")
    assert contents(tmp_path / "copy") == contents(folder)


def test_a_file_of_others_keeps_its_weights(folder: Path, tmp_path: Path):
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    assert read_folder(folder).header is None
    copy_with_base(read_folder(folder), tmp_path / "copy", "me/other")
    found = read_folder(tmp_path / "copy")
    assert found.header is None
    assert found.base == "me/other"
    assert json.loads((tmp_path / "copy" / "adapter_config.json").read_text())["r"] == 2
    assert (tmp_path / "copy" / weights.name).read_bytes() == weights.read_bytes()


def test_a_folder_without_its_json_gets_one(folder: Path, tmp_path: Path):
    (folder / "adapter_config.json").unlink()
    copy_with_base(read_folder(folder), tmp_path / "copy", "me/base")
    assert (tmp_path / "copy" / "adapter_config.json").is_file()
    assert read_folder(tmp_path / "copy").base == "me/base"
