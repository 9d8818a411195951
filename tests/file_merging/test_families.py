"""Merged file to file, a checkpoint is what merging in memory and saving gives."""

from pathlib import Path

import pytest
import torch

import hf_lora
from tests.file_merging.families import FAMILIES, Family, made, tensors_in

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@each_family
def test_it_is_what_merging_in_memory_gives(family: Family, tmp_path: Path):
    base, adapter, model = made(family, tmp_path)
    report = hf_lora.merge_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert report.verified is not None
    assert report.verified.worst <= 1
    hf_lora.merge_and_unwrap(model)
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info["missing_keys"])
    assert not any(info["unexpected_keys"])
    there, here = again.state_dict(), model.state_dict()
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    other = {"_name_or_path"}
    if model.config.model_type == "t5":  # which says of tied weights that they are, always
        other.add("tie_word_embeddings")
    then, now = model.config.to_dict(), again.config.to_dict()
    assert {n for n in then.keys() | now.keys() if then.get(n) != now.get(n)} <= other


@each_family
def test_names_files_and_what_is_untouched_are_the_bases_own(family: Family, tmp_path: Path):
    base, adapter, _ = made(family, tmp_path, torch.bfloat16)
    report = hf_lora.merge_checkpoint(base, adapter, tmp_path / "out")
    files = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"hf_lora_merge.json"}
    before, after = dict(tensors_in(base)), dict(tensors_in(tmp_path / "out"))
    assert after.keys() == before.keys() | set(report.added)
    changed = {each.name for each in report.tensors}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor) != (name in changed), name
    assert sum(map(torch.Tensor.nbytes.__get__, after.values())) == report.copied + report.written
