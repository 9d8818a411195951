"""Disks that are full, places that cannot be written, links that lead elsewhere."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import SaveError, StateError
from tests import tiny
from tests.files import edit
from tests.files.refusing import files_in


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """Return a function that lets this process write so many bytes to a file and no more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lift() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("size", [0, 100, 1000, 3000])
def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path, full_disk, size: int):
    """At every size that is too small: for the weights, for the JSON, for the note."""
    expected = tiny.saved(tmp_path)
    files, larger = files_in(tmp_path), tiny.adapted(seed=9, r=4)
    full_disk(size)
    with pytest.raises(SaveError, match=r"adapter_model\.safetensors could not be written"):
        hf_lora.save(larger, tmp_path)
    lift()
    assert files_in(tmp_path) == files
    assert torch.equal(tiny.answers(hf_lora.load(tiny.Net(), tmp_path)), expected)


def test_a_full_disk_leaves_no_folder(tmp_path: Path, full_disk):
    model = tiny.adapted()
    full_disk(10)
    with pytest.raises(SaveError):
        hf_lora.save(model, tmp_path / "a" / "b" / "c")
    lift()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every step of a save that touches the disk fails in turn; the save says so each time."""
    expected = tiny.saved(tmp_path / "adapter")
    files, model = files_in(tmp_path), tiny.adapted(seed=9, r=4)
    for name in ("open", "fsync", "replace"):
        original = getattr(os, name)
        for step in range(1, 30):
            calls = 0

            def failing(*args, step=step, original=original, **kwargs):
                nonlocal calls
                calls += 1
                if calls == step:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return original(*args, **kwargs)

            monkeypatch.setattr(os, name, failing)
            words = ""
            try:
                hf_lora.save(model, tmp_path / "adapter")
            except SaveError as error:
                words = str(error)
            monkeypatch.setattr(os, name, original)
            answer = tiny.answers(hf_lora.load(tiny.Net(), tmp_path / "adapter"))
            if not words:
                break
            assert "No space left" in words
            # the old adapter, or the new one whole: nothing of it is lost
            assert torch.equal(answer, expected) or torch.equal(answer, tiny.answers(model))
            hf_lora.save(tiny.adapted(), tmp_path / "adapter")
            assert files_in(tmp_path) == files
        assert step > 1
        hf_lora.save(tiny.adapted(), tmp_path / "adapter")


@pytest.mark.parametrize("name", [edit.WEIGHTS, edit.CONFIG])
def test_a_folder_where_a_file_should_be(tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_text("x")
    with pytest.raises(SaveError, match="is a folder"):
        hf_lora.save(tiny.adapted(), tmp_path)
    assert files_in(tmp_path) == {f"{name}/precious": b"x"}


def test_a_file_where_the_folder_should_be(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for folder in ("file", "file/below"):
        with pytest.raises(SaveError, match="cannot be a folder"):
            hf_lora.save(tiny.adapted(), tmp_path / folder)
    assert files_in(tmp_path) == {"file": b"x"}


def test_links_are_replaced_and_not_followed(tmp_path: Path):
    """As a model cache lays them out: writing through them would change another revision."""
    tiny.saved(tmp_path / "blobs")
    files = files_in(tmp_path / "blobs")
    (tmp_path / "adapter").mkdir()
    for name in (edit.WEIGHTS, edit.CONFIG):
        (tmp_path / "adapter" / name).symlink_to(tmp_path / "blobs" / name)
    hf_lora.load(tiny.Net(), tmp_path / "adapter")
    expected = tiny.saved(tmp_path / "adapter", seed=8, r=3)
    assert files_in(tmp_path / "blobs") == files
    assert torch.equal(tiny.answers(hf_lora.load(tiny.Net(), tmp_path / "adapter")), expected)


def test_a_link_in_the_place_of_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever may write to the folder must not choose what a save overwrites elsewhere."""
    (tmp_path / "victim").write_text("x")
    (tmp_path / "adapter").mkdir()
    original = os.open

    def racing(path, flags, *args, **kwargs):
        if str(path).endswith(".tmp") and not os.path.lexists(path):
            os.symlink(tmp_path / "victim", path)
        return original(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", racing)
    with pytest.raises(SaveError, match="File exists"):
        hf_lora.save(tiny.adapted(), tmp_path / "adapter")
    assert (tmp_path / "victim").read_text() == "x"


def test_an_adapter_without_numbers(tmp_path: Path):
    model = tiny.adapted()
    model.to("meta")
    with pytest.raises(StateError):
        hf_lora.save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_the_format_cannot_hold(tmp_path: Path):
    model = tiny.Net()
    model.head.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    hf_lora.wrap(model, targets="q_proj", r=2, train=["head"])
    with pytest.raises(SaveError, match=r"head\.phase: safetensors cannot hold torch.complex128"):
        hf_lora.save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_what_pefts_format_cannot_say(tmp_path: Path):
    """PEFT compares ends of text: `head` there means `my_head`, which has factors, as well."""
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "my_head": nn.Linear(4, 4)})
    hf_lora.wrap(model, targets="my_head", r=2, train=["head"])
    with pytest.raises(SaveError, match="PEFT would take my_head for a module trained in full"):
        hf_lora.save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_of_several_adapters_all_can_be_saved_or_none_is(tmp_path: Path):
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "my_head": nn.Linear(4, 4)})
    hf_lora.wrap(model, targets="my_head", r=2)
    hf_lora.add_adapter(model, "second", targets="my_head", r=1, train=["head"])
    with pytest.raises(SaveError, match="PEFT would take my_head"):
        hf_lora.save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    hf_lora.save(model, tmp_path / "adapter", adapter="default")
