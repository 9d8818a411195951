"""``hf-lora init``: a recipe that says why, and that trains as it stands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_lora.recipes.file import read_recipe
from hf_lora.recipes.starting import examples
from tests.tiny_base import Run, tiny_tokenizer

Write = Callable[[str, Any], Path]
WORDS = ("rank", "alpha", "model", "matrix", "small", "large", "weight", "train", "file") * 3
CHATS = [
    {"conversations": [{"from": "human", "value": f"{w}?"}, {"from": "gpt", "value": w[::-1]}]}
    for w in WORDS
]
PAIRS = [{"question": f"{w}?", "answer": w[::-1]} for w in WORDS]
TEXT = "\n".join(WORDS)


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("rows.jsonl", CHATS, "sharegpt"),
        ("rows.jsonl", PAIRS, "completion"),
        ("rows.json", PAIRS, "completion"),
        ("rows.txt", TEXT, "text"),
        ("a name: 'odd'.jsonl", PAIRS, "completion"),
    ],
)
def test_what_it_writes_trains_as_it_stands(
    run: Run, base: Path, write: Write, tmp_path: Path, name: str, content: Any, form: str
):
    data, recipe = write(name, content), tmp_path / "recipes" / "run.yaml"
    found = json.loads(run("init", base, data, "-o", recipe, "--json").stdout)
    assert (found["form"], found["rows"], found["faulty"]) == (form, 27, 0)
    said = read_recipe(recipe)
    assert said.data.form == form
    assert said.data.loss == ("all" if form == "text" else "completions")
    assert said.base.model == str(base)
    trained = json.loads(run("train", recipe, "--steps", 2, "--json").stdout)
    assert trained["best"]["steps"] == 2
    assert trained["examples"]["cut"] == trained["examples"]["dropped"] == 0
    assert trained["adapter"] == str(recipe.parent / "run-adapter")


def test_it_says_what_it_saw_and_what_is_next(run: Run, base: Path, write: Write, tmp_path: Path):
    recipe = tmp_path / "run.yaml"
    told = run("init", base, write("rows.jsonl", PAIRS), "-o", recipe).stdout
    assert "27 rows, read as completion" in told
    assert told.endswith(f"next:\n  hf-lora train {recipe} --dry-run\n  hf-lora train {recipe}\n")
    text = recipe.read_text()
    assert "# told from the columns: completion (question, answer); 27 rows" in text
    assert "columns: {prompt: question, completion: answer}" in text


def test_the_length_is_what_nearly_all_rows_fit_into(
    run: Run, base: Path, write: Write, tmp_path: Path
):
    rows = [{"text": "x" * 100}] * 399 + [{"text": "y" * 400}]
    data, recipe = write("rows.jsonl", rows), tmp_path / "run.yaml"
    found = json.loads(run("init", base, data, "-o", recipe, "--json").stdout)
    assert found["median"] == 101
    assert found["longest"] == 401
    assert found["max_length"] == 128


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"a": "b"}], "the first row has the columns a; say the form"),
        ([], "the columns none"),
        ([{"conversations": [{"from": "martian", "value": "a"}]}], "turn 1 is from 'martian'"),
    ],
)
def test_data_of_no_use_is_told(
    run: Run, base: Path, write: Write, tmp_path: Path, content: Any, told: str
):
    recipe = tmp_path / "run.yaml"
    assert told in run("init", base, write("a.jsonl", content), "-o", recipe, code=1).stderr
    assert not recipe.exists()


def test_a_chat_without_a_template_is_told(run: Run, base: Path, write: Write, tmp_path: Path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    recipe = tmp_path / "run.yaml"
    told = run("init", bare, write("rows.jsonl", CHATS), "-o", recipe, code=1).stderr
    assert "no chat template; take an instruct model's" in told


def test_nothing_is_written_over(run: Run, base: Path, write: Write, tmp_path: Path):
    recipe = write("run.yaml", "mine")
    told = run("init", base, write("a.jsonl", PAIRS), "-o", recipe, code=1).stderr
    assert "is there already" in told
    assert "is there already" in run("init", "--example", "chat", "-o", recipe, code=1).stderr
    assert recipe.read_text() == "mine"


@pytest.mark.parametrize("name", sorted(examples()))
def test_an_example_comes_with_its_data(run: Run, tmp_path: Path, name: str):
    recipe = tmp_path / "new" / "mine.yaml"
    found = json.loads(run("init", "--example", name, "-o", recipe, "--json").stdout)
    assert found["files"][0] == str(recipe)
    assert len(found["files"]) == 2
    assert "hf-lora train mine.yaml" in recipe.read_text()
    read_recipe(recipe)


def test_wrong_usage(run: Run):
    for arguments in ([], ["model"], ["model", "data", "--example", "chat"]):
        assert "MODEL and DATA, or --example NAME" in run("init", *arguments, code=2).stderr
    assert "there are chat, classification" in run("init", "--example", "poem", code=1).stderr


def test_short_names_of_the_command_line_and_of_recipes(
    run: Run, base: Path, write: Write, tmp_path: Path
):
    write("rows.jsonl", PAIRS)
    recipe = {
        "base": str(base),
        "data": {"train": "rows.jsonl"},
        "trainer": {"lr": 1, "epochs": 7, "batch_size": 4, "accumulation": 2},
        "output": "out",
    }
    path = write("run.json", recipe)
    assert read_recipe(path).trainer == {
        "learning_rate": 1,
        "num_train_epochs": 7,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    arguments = ["--lr", "[1e-3]", "--epochs", 1, "--batch-size", 9, "--rank", 3, "--alpha", 5]
    found = json.loads(run("train", path, *arguments, "--max-length", 32, "--json").stdout)
    assert found["best"]["learning_rate"] == 1e-3
    assert found["best"]["steps"] == 2  # of 27 rows in nines, two at a time
    shown = json.loads(run("show", tmp_path / "out", "--json").stdout)
    assert {(layer["r"], layer["alpha"]) for layer in shown["layers"]} == {(3, 5.0)}
    told = run(
        "train", write("b.json", {**recipe, "trainer": {"lr": 1, "learning_rate": 2}}), code=1
    )
    assert "trainer.learning_rate: the same as learning_rate, which stands there" in told.stderr


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"learning_rate": 1}, "learning_rate: unknown field (here: trainer.learning_rate)"),
        ({"model": "a"}, "model: unknown field (here: base)"),
        ({"dataset": "a"}, "dataset: unknown field (here: data.train)"),
        ({"lora_alpha": 1}, "lora_alpha: unknown field (here: lora.alpha)"),
        ({"lora": {"lr": 1}}, "lora.lr: unknown field (here: trainer.lr)"),
        ({"lora": {"alhpa": 1}}, "lora.alhpa: unknown field; did you mean alpha?"),
        ({"data": {"sequence_len": 1}}, "data.sequence_len: unknown field (here: data.max_length)"),
        ({"trainer": {"learning_rat": 1}}, "did you mean learning_rate?"),
        ({"trainer": {"r": 1}}, "trainer.r: unknown field (here: lora.r)"),
    ],
)
def test_what_stands_elsewhere_is_told(run: Run, write: Write, recipe: Any, told: str):
    assert told in run("train", write("a.json", recipe), code=1).stderr
