"""The skill file: every command in it runs as it stands, on a tiny model; so does its Python."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_lora.cli.schema import SCHEMAS
from hf_lora.cli.skill import FILE
from tests.tiny_base import Run

TEXT = FILE.read_text()
COMMANDS = re.findall(r"^```bash\n(.*?)\n```", TEXT, re.MULTILINE | re.DOTALL)
ROWS = [
    {"conversations": [{"from": "human", "value": f"{w}?"}, {"from": "gpt", "value": w[::-1]}]}
    for w in ("rank", "alpha", "model", "matrix", "small", "large") * 4
]


@pytest.fixture
def folder(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "BASE").symlink_to(base)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_and_the_python_run_in_order(run: Run, folder: Path):
    assert len(COMMANDS) == 10
    found: dict[str, Any] = {}
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program == "hf-lora"
        found[words[0]] = json.loads(run(*words).stdout)
        name = "train --dry-run" if "--dry-run" in words else words[0]
        assert SCHEMAS[name].keys() <= found[words[0]].keys()
    # the fields that it says to look at
    assert found["train"]["best"]["eval_loss"] > 0
    assert {"cut", "dropped"} <= found["train"]["examples"].keys()
    assert found["plan"]["problems"] == []
    assert found["show"]["dead"] == []
    assert found["eval"]["adapter"]["loss"] > 0
    (code,) = re.findall(r"^```python\n(.*?)\n```", TEXT, re.MULTILINE | re.DOTALL)
    exec(code, {})
    assert (folder / "again" / "adapter_model.safetensors").is_file()


def test_its_errors_are_those_of_the_library(run: Run, folder: Path):
    """Each in the table is caused here, by one command."""
    words = re.findall(r"^\| `(.*?)` \|", TEXT, re.MULTILINE)
    run("init", "BASE", "rows.jsonl", "-o", "run.yaml")
    run("train", "run.yaml", "--steps", 1, "-o", "adapter")
    Path("odd.jsonl").write_text('{"a": "b"}\n')
    Path("wrong.json").write_text('{"bass": 1}')
    causes = {
        "the first row has the columns": ["init", "BASE", "odd.jsonl", "-o", "x.yaml"],
        "holds an adapter or a training already": ["train", "run.yaml", "-o", "adapter"],
        "unknown field; did you mean": ["train", "wrong.json"],
        "matches no module; near:": ["plan", "BASE", "-t", "q_prjo"],
    }
    for told, command in causes.items():
        assert any(told in line for line in words), told
        done = run(*command, code=1)
        assert told in done.stderr + done.stdout
    assert len(words) == 7


def test_it_is_printed_whole_and_small_enough_to_be_read(run: Run):
    assert run("skill").stdout == TEXT
    assert json.loads(run("skill", "--json").stdout) == {"skill": TEXT}
    head = TEXT.split("---\n")[1]
    assert re.match(r"name: [a-z-]+\ndescription: .{40,500}\n$", head)
    assert len(TEXT) < 6000
    for command in re.findall(r"`hf-lora (\w+)", TEXT):
        run(command, "--help")
