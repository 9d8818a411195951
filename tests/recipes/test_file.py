"""A recipe is checked in full before any model is loaded: every problem, each with its address."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError
from hf_lora.recipes.data import Data, DataSet, Files
from hf_lora.recipes.file import read_recipe
from hf_lora.recipes.forms import FORMS
from tests.tiny_base import Run

Write = Callable[[str, Any], Path]


@pytest.fixture
def recipe(write: Write) -> Callable[..., Path]:
    """A recipe that is fine but for what is given: `section={...}`, or a whole YAML text."""
    write("rows.jsonl", [{"text": "one two"}])

    def make(text: str | None = None, **changes: Any) -> Path:
        fine = {
            "base": "me/base",
            "data": {"form": "text", "train": "rows.jsonl"},
            "output": "out",
        }
        return write("recipe.yaml", {**fine, **changes} if text is None else text)

    return make


def problems(path: Path, *settings: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, settings)
    headline, *lines = str(caught.value).splitlines()
    assert headline == f"{path} cannot be used:"
    return [line.removeprefix("  - ") for line in lines]


def test_the_least_that_a_recipe_says(recipe: Callable[..., Path], tmp_path: Path):
    found = read_recipe(recipe())
    assert found.base.model == "me/base"
    assert found.data == Data(form="text", train=Files((tmp_path / "rows.jsonl",)))
    assert found.lora == LoRAConfig()
    assert (found.trainer, found.push) == ({}, None)
    assert found.output == tmp_path / "out"


def test_everything_that_is_wrong_is_told_at_once(run: Run, write: Write):
    path = write(
        "bad.yaml",
        {
            "bass": "x",
            "data": {"form": "poem", "train": "absent.jsonl", "evaluation": 0.1, "packing": "yes"},
            "lora": {"rank": 8, "alpha": "loud", "dropout": 2},
            "trainer": {
                "learning_rate": "fast",
                "max_stepz": 1,
                "output_dir": "x",
                "max_steps": 1.5,
            },
            "push": {"private": 1},
        },
    )
    result = run("train", path, code=1)
    assert result.stdout == ""
    lines = [line.strip(" -") for line in result.stderr.splitlines()[1:]]
    known = ", ".join(f.name for f in dataclasses.fields(Data))
    assert lines == [
        "bass: unknown field; did you mean base?",
        "base: is missing",
        f"data.evaluation: unknown field; known: {known}",
        f"data.train: there is no file {path.parent / 'absent.jsonl'}",
        f"data.form: 'poem' is not one of {', '.join(FORMS)}",
        "data.packing: 'yes' is not true or false",
        "output: is missing",
        "lora.rank: unknown field (here: lora.r)",
        "lora.alpha: 'loud' is not a finite number above 0",
        "lora.dropout: 2 is not a probability in [0, 1)",
        "push.repo_id: is missing",
        "push.private: 1 is not true or false",
        "trainer.output_dir: set output instead",
        "trainer.max_stepz: unknown field; did you mean max_steps?",
        "trainer.learning_rate: 'fast' is not a number",
        "trainer.max_steps: 1.5 is not a whole number",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {"model": "me/base", "dtype": "int8"}}, "base.dtype: 'int8' is not one of auto"),
        ({"base": {"model": "/no/such/folder"}}, "base.model: /no/such/folder is no folder"),
        ({"base": 7}, "base: 7 is not a mapping of fields"),
        (
            {"base": {"model": "me/b", "load_in_4bit": True, "load_in_8bit": True}},
            "base: load_in_4bit and load_in_8bit exclude each other",
        ),
        (
            {"base": {"model": "me/b", "load_in_4bit": True, "gguf_file": "x.gguf"}},
            "base.load_in_4bit: transformers cannot quantize a GGUF file again",
        ),
        ({"output": 3}, "output: 3 is not the name of a folder"),
        ({"lora": None}, "lora: None is not a mapping"),
        ({"lora": {"targets": []}}, "lora.targets: empty"),
        ({"push": {"repo_id": "a/b/c"}}, "push.repo_id: Repo id must be"),
        ({"trainer": {"learning_rate": []}}, "trainer.learning_rate: [] is empty"),
        ({"trainer": {"learning_rate": -1.0}}, "trainer.learning_rate: -1.0 is not above 0"),
        ({"trainer": {"eval_strategy": "sometimes"}}, "trainer: sometimes is not a valid"),
        ({"trainer": {"eval_strategy": "epoch"}}, "trainer.eval_strategy: there is nothing to"),
        ({"trainer": {"learning_rate": [1e-3, 1e-4]}}, "several to choose from need data.eval"),
        ({"trainer": {"push_to_hub": True}}, "trainer.push_to_hub: set push instead"),
        ({"trainer": {"num_train_epochs": 0}}, "neither max_steps nor num_train_epochs"),
    ],
)
def test_a_field_that_cannot_be_used(
    recipe: Callable[..., Path], changes: dict[str, Any], words: str
):
    (problem,) = problems(recipe(**changes))
    assert words in problem


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": "me/data"}, "written {dataset: me/data}"),
        ({"train": "rows.tsv"}, "written {dataset: rows.tsv}"),
        ({"train": []}, "data.train: [] is not a file"),
        ({"train": {"name": "x"}}, "data.train.dataset: is missing"),
        ({"train": {"dataset": "me/d", "files": "x"}}, "data.train.files: unknown field"),
        ({"eval": 2}, "data.eval: 2 is neither a source nor a share"),
        ({"eval": 1.5}, "data.eval: 1.5 is neither"),
        ({"eval": "absent.csv"}, "data.eval: there is no file"),
        ({"loss": "completions"}, "data.loss: plain text has no completions"),
        ({"form": "chat", "packing": True}, "data.packing: for text only"),
        ({"columns": {"prompt": "q"}}, "data.columns.prompt: unknown field; known: text"),
        ({"columns": {"text": 3}}, "data.columns.text: 3 is not the name"),
        ({"max_length": 1}, "data.max_length: 1 is less than 2"),
    ],
)
def test_data_that_cannot_be_used(recipe: Callable[..., Path], data: dict[str, Any], words: str):
    (problem,) = problems(recipe(data={"form": "text", "train": "rows.jsonl", **data}))
    assert words in problem


def test_yaml_as_people_mean_it(recipe: Callable[..., Path]):
    found = read_recipe(
        recipe(
            "base: me/base\noutput: out\ndata: {form: text, train: rows.jsonl, eval: 1e-1}\n"
            "trainer:\n  learning_rate: [1e-4, 2E-3, .5, 3]\n  save_strategy: no\n"
            "  logging_first_step: true\n  max_steps: 10\n  run_name: '1e-4'\n"
        )
    )
    assert found.trainer["learning_rate"] == [1e-4, 2e-3, 0.5, 3]
    assert found.trainer["save_strategy"] == "no"
    assert found.trainer["logging_first_step"] is True
    assert found.trainer["max_steps"] == 10
    assert found.trainer["run_name"] == "1e-4"
    assert found.data.eval == 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: a\nbase: b\n", "the key 'base' stands twice"),
        ("- a\n", "holds list, not a mapping"),
        ("{", "cannot be read as a recipe"),
        ("a: !!python/object/apply:os.getcwd []", "cannot be read as a recipe"),
    ],
)
def test_a_file_that_is_no_recipe(recipe: Callable[..., Path], text: str, words: str):
    with pytest.raises(ConfigError, match=words):
        read_recipe(recipe(text))


def test_missing_and_misnamed_files(run: Run, write: Write, tmp_path: Path):
    assert "cannot be read" in run("train", tmp_path / "absent.yaml", code=1).stderr
    assert "ends in '.txt'" in run("train", write("a.txt", "x"), code=1).stderr


def test_json_and_data_sets_and_columns(write: Write, tmp_path: Path):
    source = {"dataset": "me/data", "name": "en", "split": "train[:10]", "revision": "v1"}
    content = {
        "base": {"model": "me/base", "revision": "v2"},
        "data": {"form": "completion", "train": source, "columns": {"prompt": "q"}},
        "output": "out",
        "push": {"repo_id": "me/adapter", "private": True},
    }
    found = read_recipe(write("recipe.json", content))
    assert found.data.train == DataSet(**source)
    assert found.data.columns == {"prompt": "q"}
    assert found.push is not None
    assert found.push.private is True


def test_paths_are_relative_to_the_recipe(recipe: Callable[..., Path], tmp_path: Path):
    (tmp_path / "base").mkdir()
    found = read_recipe(recipe(base="base"), (), Path("elsewhere"))
    assert found.base.model == str(tmp_path / "base")
    # an option of the command line is relative to where it is typed
    assert found.output == Path.cwd() / "elsewhere"


def test_settings_from_the_command_line(recipe: Callable[..., Path]):
    settings = (
        "base.dtype=bfloat16",
        "lora.r=4",
        "lora.overrides={v_proj: {r: 2}}",
        "trainer.learning_rate=[1e-4, 1e-3]",
        "data.eval=0.5",
    )
    found = read_recipe(recipe(), settings)
    assert (found.base.model, found.base.dtype) == ("me/base", "bfloat16")
    assert (found.lora.r, found.lora.overrides) == (4, {"v_proj": {"r": 2}})
    assert found.trainer["learning_rate"] == [1e-4, 1e-3]
    assert found.data.eval == 0.5
    assert problems(recipe(), "lora.r", "x.y=1", "output.z=1", "lora.r={")[:2] == [
        "--set lora.r: is not section.field=value",
        "--set output.z=1: output has no fields",
    ]


def test_the_digest_is_of_what_decides_the_result(recipe: Callable[..., Path]):
    def digest(**changes: Any) -> str:
        return read_recipe(recipe(**changes)).digest

    assert digest() == digest(output="elsewhere") == digest(push={"repo_id": "me/x"})
    assert len({digest(), digest(lora={"r": 1}), digest(trainer={"seed": 1})}) == 3


def test_nothing_is_loaded_for_a_recipe_that_is_wrong(run: Run, write: Write, base: Path):
    """The base is broken, and nobody notices, because the recipe is wrong as well."""
    write("rows.jsonl", [{"text": "one two"}])
    path = write(
        "recipe.yaml",
        {
            "base": str(base / "absent"),
            "data": {"form": "text", "train": "rows.jsonl"},
            "output": "out",
            "lora": {"rank": 1},
        },
    )
    error = json.loads(run("train", path, "--json", code=1).stdout)["error"]
    assert error["type"] == "ConfigError"
    assert "lora.rank: unknown field" in error["message"]
