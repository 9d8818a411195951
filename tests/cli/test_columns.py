"""What every command prints on a terminal of 80 columns, kept as files beside this one.

``UPDATE=1 pytest tests/cli/test_columns.py`` writes them again; look at the difference. Numbers
stand as N: what they are is said by other tests.
"""

import difflib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lora
from hf_lora.cli.schema import SCHEMAS
from tests.oracle.adapting import scramble
from tests.tiny_base import Run, tiny_model, tiny_tokenizer

Write = Callable[[str, Any], Path]
KEPT = Path(__file__).parent / "columns"
CHATS = [
    {"conversations": [{"from": "human", "value": f"{w}?"}, {"from": "gpt", "value": w[::-1]}]}
    for w in ("rank", "alpha", "model", "matrix", "small", "large") * 4
]
TYPOS = {
    "base": "base",
    "data": {"train": "rows.jsonl", "max_lenght": 64},
    "lora": {"rang": 8},
    "trainer": {"learning_rat": 1e-4},
    "output": "typos",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of twelve layers with an adapter, another base, and data."""
    place = tmp_path_factory.mktemp("columns")
    for name, sizes in (("base", {}), ("wide", {"hidden_size": 48}), ("low", {})):
        layers = 8 if name == "low" else 12
        model = tiny_model(num_hidden_layers=layers, **sizes)
        model.save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    torch.manual_seed(0)
    hf_lora.wrap(model, r=4)
    scramble(model)
    hf_lora.save(model, place / "adapter")
    shutil.copytree(place / "adapter", place / "other")
    hf_lora.merge_checkpoint(place / "base", place / "adapter", place / "tuned")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (place / "typos.json").write_text(json.dumps(TYPOS))
    return place


@pytest.fixture
def at_80(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, list[str]]]:
    """A command in that folder: what it printed, masked, and its lines."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "80")

    def call(words: str, code: int = 0) -> tuple[str, list[str]]:
        found = run(*words.split(), code=code)
        text = found.stdout + ("\n--- on stderr:\n" + found.stderr if found.stderr else "")
        text = text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
        text = text.split("most was rounded away of")[0]  # of which is a matter of rounding
        masked = re.sub(r"\d[\d,]*(\.\d+)?(e-?\d+)?", "N", text)
        masked = re.sub(r"#+", "#", masked)  # bars are as long as numbers are large
        masked = re.sub(r"N( [KM]iB| GiB| B| s| min| h)", "N unit", masked)
        return re.sub(r" +", " ", masked), text.splitlines()

    return call


CASES = {
    "init": ("init base rows.jsonl -o run.yaml", 0),
    "dry_run": ("train run.yaml --dry-run", 0),
    "train": ("train run.yaml --steps 4 --set trainer.logging_steps=2", 0),
    "plan": ("plan base", 0),
    "plan_problem": ("plan base -t q_prjo", 1),
    "show": ("show adapter", 0),
    "eval": ("eval adapter rows.jsonl", 0),
    "export": ("export adapter", 0),
    "similarity": ("similarity adapter adapter", 0),
    "combine": ("combine adapter other=0.5 -o combined", 0),
    "resize": ("resize adapter --rank 1 -o resized", 0),
    "extract": ("extract base tuned -o extracted --rank 4", 0),
    "diff": ("diff adapter adapter", 0),
    "diff_bases": ("diff base wide", 0),
    "merge": ("merge adapter --base base -o merged", 0),
    "another_base": ("eval adapter rows.jsonl --base wide", 1),
    "fewer_layers": ("eval adapter rows.jsonl --base low", 1),
    "typos": ("train typos.json", 1),
    "no_adapter": ("show base", 1),
    "no_adapter_pushed": ("push base me/name", 1),
    "schema": ("schema", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_output_fits_and_is_the_one_that_is_kept(at_80: Any, name: str):
    words, code = CASES[name]
    masked, lines = at_80(words, code)
    too_long = [line for line in lines if len(line) > 80 and " " in line.strip()[:60]]
    assert not too_long, too_long
    path = KEPT / f"{name}.txt"
    if os.environ.get("UPDATE"):
        KEPT.mkdir(exist_ok=True)
        path.write_text(f"$ hf-lora {words}\n{masked}")
    kept = path.read_text().split("\n", 1)[1]
    assert masked == kept, "\n".join(difflib.unified_diff(kept.split("\n"), masked.split("\n")))


def test_three_typos_take_less_than_twelve_lines(at_80: Any):
    _, lines = at_80("train typos.json", 1)
    assert len(lines) < 12
    assert "did you mean max_length?" in " ".join(lines)
    assert "did you mean learning_rate?" in " ".join(lines)


def test_layers_stand_in_the_order_of_their_numbers(run: Run, folder: Path):
    shown = run("show", folder / "adapter").stdout
    numbers = [int(n) for n in re.findall(r"layers\.(\d+)\.self_attn\.q_proj", shown)]
    assert numbers == [*range(12)]


def test_a_layer_of_each_kind_is_told_instead_of_all(at_80: Any):
    _, lines = at_80("eval adapter rows.jsonl --base low", 1)
    told = [line for line in lines if "no such module" in line]
    assert len(told) == 7
    assert all("layers.{8-11}." in line for line in told)


DOCUMENTED = {
    "init": "init base rows.jsonl -o other.yaml",
    "init --example": "init --example chat -o example/run.yaml",
    "train --dry-run": "train run.yaml --dry-run",
    "train": "train run.yaml --steps 1 -o another",
    "plan": "plan base",
    "show": "show adapter",
    "show --heatmap": "show adapter --heatmap map.png --base base",
    "eval": "eval adapter rows.jsonl",
    "generate": "generate adapter -p rank --max-new-tokens 1",
    "merge": "merge adapter --base base -o merged2",
    "export": "export adapter",
    "similarity": "similarity adapter adapter",
    "combine": "combine adapter other=0.5 -o combined",
    "resize": "resize adapter --rank 1 -o resized",
    "extract": "extract base tuned -o extracted --rank 2",
    "diff": "diff adapter adapter",
    "schema": "schema",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_json_is_as_documented(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.chdir(folder)
    if "run.yaml" in DOCUMENTED[name] and not Path("run.yaml").exists():
        run("init", "base", "rows.jsonl", "-o", "run.yaml")
    found = json.loads(run(*DOCUMENTED[name].split(), "--json").stdout)
    if name == "schema":
        assert found == {command: dict(fields) for command, fields in SCHEMAS.items()}
        return
    assert SCHEMAS[name].keys() <= found.keys()


def test_what_is_documented_are_commands():
    from hf_lora.cli.main import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert {name.split()[0] for name in SCHEMAS} <= commands
