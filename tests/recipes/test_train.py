"""``hf_lora.train``: the command's training from Python, on a file or on a mapping."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

import hf_lora
from hf_lora import ConfigError, HfLoRAWarning, LoRAConfig
from tests.tiny_base import Run

Write = Callable[[str, Any], Path]
LORA = {"targets": ["q_proj", "v_proj"], "r": 4}
ROWS = [{"text": f"{word} {word[::-1]}"} for word in ("rank", "alpha", "model", "matrix", "small")]


@pytest.fixture
def recipe(write: Write, base: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe as a mapping; keyword arguments change its sections' fields."""
    write("rows.jsonl", ROWS)

    def make(**changes: dict[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = {
            "base": {"model": base},
            "data": {"form": "text", "train": [tmp_path / "rows.jsonl"], "eval": 0.4},
            "lora": LORA,
            "trainer": {"max_steps": 3, "save_steps": 2, "learning_rate": 1e-2},
            "output": tmp_path / "python",
        }
        for section, fields in changes.items():
            content[section] = content[section] | fields
        return content

    return make


def as_file(write: Write, content: dict[str, Any], output: str) -> Path:
    """Write the same recipe as a file, in which paths are text."""
    base, data = {"model": str(content["base"]["model"])}, content["data"] | {"train": "rows.jsonl"}
    return write(
        f"{output}.json", {**content, "base": base, "data": data, "lora": LORA, "output": output}
    )


def test_a_mapping_a_file_and_the_command_train_the_same_bytes(
    run: Run, write: Write, recipe: Callable[..., dict[str, Any]], tmp_path: Path
):
    first = hf_lora.train(recipe())
    second = hf_lora.train(as_file(write, recipe(), "file"))
    run("train", as_file(write, recipe(), "command"))
    weights = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("python", "file", "command")
    ]
    assert weights[0] == weights[1] == weights[2]
    assert first.adapter == tmp_path / "python"
    assert second.adapter == tmp_path / "file"
    assert first.best.eval_loss == second.best.eval_loss
    assert (first.train_examples, first.eval_examples, first.rows.rows) == (3, 2, 5)
    assert first.runs == (first.best,)
    assert first.best.steps == 3
    assert str(first.adapter) in str(first)


def test_what_was_trained_opens_and_says_something_else_than_the_base(
    recipe: Callable[..., dict[str, Any]],
):
    trained = hf_lora.train(recipe())
    model = hf_lora.from_pretrained(trained.adapter)
    assert hf_lora.adapters(model).keys() == {"default"}
    factors = load_file(trained.adapter / "adapter_model.safetensors")
    assert all(factor.any() for name, factor in factors.items() if "lora_B" in name)


def test_a_config_and_settings_and_an_output_are_taken(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    content = {**recipe(), "lora": LoRAConfig(targets=["q_proj"], r=2)}
    monkeypatch.chdir(tmp_path)
    trained = hf_lora.train(
        content, settings=["lora.r=3", "trainer.learning_rate=[1e-3, 1e-2]"], output="elsewhere"
    )
    assert trained.adapter == tmp_path / "elsewhere"
    assert [run.learning_rate for run in trained.runs] == [1e-3, 1e-2]
    assert trained.best in trained.runs
    shapes = {f.shape for f in load_file(trained.adapter / "adapter_model.safetensors").values()}
    assert all(3 in shape for shape in shapes)
    assert content["lora"].r == 2
    assert content["output"] == tmp_path / "python"


def test_it_goes_on_only_if_it_is_told_to(recipe: Callable[..., dict[str, Any]]):
    trained = hf_lora.train(recipe())
    before = (trained.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds an adapter or a training already"):
        hf_lora.train(recipe())
    assert hf_lora.train(recipe(), resume=True).best == trained.best
    assert (trained.adapter / "adapter_model.safetensors").read_bytes() == before


def test_everything_that_is_wrong_is_told_at_once(recipe: Callable[..., dict[str, Any]]):
    wrong = recipe(lora={"r": 0}, data={"train": "absent.jsonl"}, trainer={"steps": 3})
    with pytest.raises(ConfigError) as caught:
        hf_lora.train(wrong)
    headline, *problems = str(caught.value).splitlines()
    assert headline.startswith("The recipe cannot be used")
    assert len(problems) == 3


@pytest.mark.parametrize("recipe", [None, 3, ["base"], b"recipe.yaml"])
def test_what_is_no_recipe_is_refused(recipe: Any):
    with pytest.raises(ConfigError, match="or a mapping of its sections"):
        hf_lora.train(recipe)


def test_tokens_are_named_as_the_tokenizer_has_them(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path
):
    words = AutoTokenizer.from_pretrained(recipe()["base"]["model"])
    token = words.convert_ids_to_tokens([7])[0]
    rows = {"train_rows": {"embed_tokens": [token, 3]}}
    hf_lora.train(recipe(lora=LORA | rows))
    found = load_file(tmp_path / "python" / "adapter_model.safetensors")
    assert sum("token_adapter" in key and len(value) == 2 for key, value in found.items()) == 1
    unknown = {"train_rows": {"embed_tokens": ["<none of it>"]}}
    with pytest.raises(ConfigError, match="<none of it>"):
        hf_lora.train(recipe(lora=LORA | unknown) | {"output": tmp_path / "unknown"})


def test_rows_that_are_cut_are_warned_of(recipe: Callable[..., dict[str, Any]]):
    with pytest.warns(HfLoRAWarning, match="5 of 5 rows were cut to 2 tokens") as found:
        hf_lora.train(recipe(data={"max_length": 2}))
    assert found[0].filename == __file__
