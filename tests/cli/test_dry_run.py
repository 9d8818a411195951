"""``hf-lora train --dry-run``: what is shown is what is trained, and nothing is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lora.recipes.base_model import load_config, load_tokenizer
from hf_lora.recipes.dataset import load_examples
from hf_lora.recipes.encoding import IGNORED
from hf_lora.recipes.estimate import faster_type, in_words
from hf_lora.recipes.file import read_recipe
from tests.tiny_base import Run

Write = Callable[[str, Any], Path]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{w}?"},
            {"role": "assistant", "content": w[::-1]},
        ]
    }
    for w in ("rank", "alpha", "model", "matrix", "small", "large", "weight", "train", "file")
]


@pytest.fixture
def recipe(write: Write, base: Path) -> Callable[..., Path]:
    write("rows.jsonl", CHATS)

    def make(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "base": str(base),
            "data": {"train": "rows.jsonl", "loss": "completions", **changes.pop("data", {})},
            "trainer": {"epochs": 3, "batch_size": 2, **changes.pop("trainer", {})},
            "output": "out",
            **changes,
        }
        return write("run.json", content)

    return make


def test_rows_are_shown_with_what_counts_for_the_loss(run: Run, recipe: Any, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    path = recipe()
    shown = run("train", path, "--dry-run").stdout
    row = "<|start|>user\n  | rank?<|stop|>\n  | <|start|>assistant\n  | «knar<|stop|>»"
    assert f"  | {row}" in shown
    assert "nothing was trained" in shown
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])
    assert max(map(len, shown.replace(str(path), "run.json").splitlines())) <= 80


def test_the_counts_are_those_of_the_examples(run: Run, recipe: Any):
    path = recipe(data={"eval": 0.3})
    found = json.loads(run("train", path, "--dry-run", "--json").stdout)
    said = read_recipe(path)
    examples = load_examples(said.data, load_tokenizer(said.base), load_config(said.base), 42)
    lengths = [len(example["input_ids"]) for example in examples.train]
    assert (found["train_examples"], found["eval_examples"]) == (len(lengths), 3) == (6, 3)
    assert found["tokens"] == sum(lengths)
    counted = [int((example["labels"] != IGNORED).sum()) for example in examples.train]
    assert found["learned"] == sum(counted)
    for row, length, learned in zip(found["rows"], lengths, counted, strict=False):
        assert sum(piece["tokens"] for piece in row) == length
        assert sum(piece["tokens"] for piece in row if piece["learned"]) == learned
    assert sum(lengths) <= found["padded"] <= len(lengths) * max(lengths)
    assert found["memory"] == sum(found[f"{name}_bytes"] for name in ("base", "adapter", "step"))


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"accumulation": 2},
        {"max_steps": 5},
        {"batch_size": 4},
        {"epochs": 0.5},
        {"batch_size": 4, "accumulation": 2, "epochs": 2},
    ],
)
def test_the_steps_are_those_that_training_takes(run: Run, recipe: Any, trainer: dict[str, Any]):
    path = recipe(trainer=trainer)
    foreseen = json.loads(run("train", path, "--dry-run", "--json").stdout)
    assert json.loads(run("train", path, "--json").stdout)["best"]["steps"] == foreseen["steps"]


def test_what_is_lost_is_told(run: Run, recipe: Any, write: Write):
    # the second row's prompt alone is too long
    long = {"role": "user", "content": "x" * 99}
    write("more.jsonl", [CHATS[0], {"messages": [long, *CHATS[0]["messages"][1:]]}])
    path = recipe(data={"train": "more.jsonl", "max_length": 40})
    shown = run("train", path, "--dry-run").stdout
    assert "1 of 2 rows cut to 40 tokens" in shown
    assert "1 of 2 rows left out, with nothing to learn" in shown


def test_what_would_fail_fails(run: Run, recipe: Any):
    assert (
        "q_prjo" in run("train", recipe(lora={"targets": ["q_prjo"]}), "--dry-run", code=1).stderr
    )
    told = run("train", recipe(data={"form": "poem"}), "--dry-run", "--json", code=1)
    assert json.loads(told.stdout)["error"]["type"] == "ConfigError"


def test_a_long_row_is_shown_in_part(run: Run, recipe: Any, write: Write):
    write("long.jsonl", [{"text": "one " * 200 + "end"}])
    path = recipe(data={"train": "long.jsonl", "loss": "all"})
    shown = run("train", path, "--dry-run").stdout
    assert " characters ... " in shown
    assert "end<|end|>»" in shown


def test_quantized_weights_take_less(run: Run, recipe: Any):
    plain = json.loads(run("train", recipe(), "--dry-run", "--json").stdout)
    path = recipe(base={"model": plain["output"].replace("out", "absent"), "load_in_4bit": True})
    said = json.loads(path.read_text())
    said["base"]["model"] = json.loads(recipe().read_text())["base"]
    path.write_text(json.dumps(said))
    quantized = json.loads(run("train", path, "--dry-run", "--json").stdout)
    assert quantized["base_bytes"] * 6 < plain["base_bytes"]


def test_durations_in_words():
    said = [in_words(seconds) for seconds in (0.1, 59, 100, 3600, 7200, 90000)]
    assert said == ["1 s", "59 s", "2 min", "60 min", "2.0 h", "25.0 h"]


def test_wide_types_are_never_too_slow():
    assert faster_type(torch.float32) is None
    assert faster_type(torch.bfloat16) in (None, "float32")
