"""A merge that is killed at any moment leaves nothing that loads; one that goes on ends alike."""

import json
import os
from pathlib import Path

import pytest
import transformers as hf

import hf_lora
from tests import forked
from tests.file_merging.families import FAMILIES, made

FAMILY = FAMILIES["llama in shards"]


def test_whatever_the_moment_it_is_killed_at(tmp_path: Path):
    base, adapter, _ = made(FAMILY, tmp_path)
    (tmp_path / "try").mkdir()
    arguments = [str(path) for path in (base, adapter, tmp_path / "try")]
    done = forked.run("tests.file_merging.killed_worker:kill_at_every_moment", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] > 30
    assert found["resumed"] > 5


def test_what_is_whole_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, adapter, _ = made(FAMILY, tmp_path)
    output = tmp_path / "out"
    real, count = os.replace, 0

    def interrupted(*args: object) -> None:
        nonlocal count
        count += str(args[1]).endswith(".safetensors")
        if count == 3:
            raise KeyboardInterrupt
        real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hf_lora.merge_checkpoint(base, adapter, output)
    assert not output.exists()
    work = tmp_path / ".out.merging"
    before = {path.name: path.stat().st_ino for path in work.glob("*.safetensors")}
    assert len(before) == 2
    report = hf_lora.merge_checkpoint(base, adapter, output, resume=True, verify=True)
    assert {name: (output / name).stat().st_ino for name in before} == before
    assert all(each.measured for each in report.tensors)
    assert report.verified is not None
    assert not work.exists()


def test_another_merge_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, adapter, _ = made(FAMILY, tmp_path)
    output = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_lora.file_merging.merge.carry", full)
        with pytest.raises(hf_lora.SaveError, match="No space"):
            hf_lora.merge_checkpoint(base, adapter, output)
    for changed in ({"dtype": "bfloat16"}, {"adapter": {str(adapter): 0.5}}):
        arguments = {"base": base, "adapter": adapter, "output": output} | changed
        with pytest.raises(hf_lora.SaveError, match="another merge has left"):
            hf_lora.merge_checkpoint(**arguments, resume=True)
    hf_lora.merge_checkpoint(base, adapter, output)  # begins anew
    assert hf.AutoModelForCausalLM.from_pretrained(output) is not None
