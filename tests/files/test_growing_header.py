"""Our part of the header may grow: what this version does not know is told, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_lora
from hf_lora import HfLoRAWarning, UnsupportedAdapterError
from tests import tiny
from tests.files import edit
from tests.files.refusing import refuse


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Change our part of a folder's header and return it."""
    tensors, metadata = edit.read_tensors(folder)
    header = json.loads(metadata["hf_lora"])
    change(header)
    edit.write_tensors(folder, tensors, {"hf_lora": json.dumps(header)})
    return header


def test_what_an_older_version_did_not_write_has_its_default(tmp_path: Path):
    expected = tiny.saved(tmp_path)

    def forget(header: dict[str, Any]) -> None:
        for name in ("requires", "trained", "fingerprint"):
            del header[name]
        for slot in header["slots"].values():
            del slot["dropout"], slot["rslora"]
        del header["config"]["train"], header["config"]["dtype"]

    change_header(tmp_path, forget)
    assert tiny.answers(hf_lora.load(tiny.Net(), tmp_path)).equal(expected)


@pytest.mark.parametrize(
    "grow",
    [
        lambda header: header.update(colour="red"),
        lambda header: header["config"].update(colour="red"),
        lambda header: [slot.update(colour=3) for slot in header["slots"].values()],
    ],
    ids=["an entry", "a field of the configuration", "a number of each layer"],
)
def test_what_a_newer_version_wrote_is_told_once_and_ignored(
    tmp_path: Path, grow: Callable[[dict[str, Any]], Any]
):
    expected = tiny.saved(tmp_path)
    change_header(tmp_path, grow)
    with pytest.warns(HfLoRAWarning, match=r"does not know were ignored: '.*colour'") as told:
        model = hf_lora.load(tiny.Net(), tmp_path)
    assert len(told) == 1
    assert tiny.answers(model).equal(expected)


def test_thousands_of_unknown_entries_are_counted(tmp_path: Path):
    tiny.saved(tmp_path)
    change_header(tmp_path, lambda header: header.update({f"n{i}": i for i in range(5000)}))
    with pytest.warns(HfLoRAWarning, match="and 4995 more"):
        hf_lora.load(tiny.Net(), tmp_path)


def test_what_it_requires_and_is_not_known_is_refused_by_name(tmp_path: Path):
    tiny.saved(tmp_path)
    change_header(tmp_path, lambda header: header["requires"].extend(["dora", "\x1b[31m"]))
    refuse(tmp_path, "'dora'", r"'\x1b[31m'", "Upgrade hf_lora", error=UnsupportedAdapterError)


@pytest.mark.parametrize(
    ("fields", "requires"),
    [
        ({}, []),
        ({"rslora": True}, ["rslora"]),
        ({"rslora": True, "train": ["head"]}, ["rslora", "trained"]),
    ],
)
def test_the_writer_names_what_changes_the_mathematics(
    tmp_path: Path, fields: dict[str, Any], requires: list[str]
):
    tiny.saved(tmp_path, **fields)
    assert change_header(tmp_path, lambda header: None)["requires"] == requires
