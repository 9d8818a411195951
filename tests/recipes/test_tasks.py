"""Classifiers, rewards and preferences by recipe: what is trained, and by whom."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    set_seed,
)

import hf_lora
from hf_lora.recipes.recipe import TaskName
from hf_lora.recipes.tasks import TASKS, collate_labelled
from tests.tiny_base import EXAMPLES, Run, tiny_tokenizer

Write = Callable[[str, Any], Path]
MOODS = [json.loads(line) for line in (EXAMPLES / "moods.jsonl").read_text().splitlines()]
PAIRS = [json.loads(line) for line in (EXAMPLES / "preferences.jsonl").read_text().splitlines()]


@pytest.fixture
def recipe(write: Write, base: Path) -> Callable[..., Path]:
    def make(task: str, rows: list[dict[str, Any]], **changes: Any) -> Path:
        write("rows.jsonl", rows)
        content = {
            "task": task,
            "base": changes.pop("base", str(base)),
            "data": {"train": "rows.jsonl", "eval": "rows.jsonl", **changes.pop("data", {})},
            "lora": {"r": 4},
            "trainer": {"lr": 1e-2, "steps": 60, "batch_size": 8, **changes.pop("trainer", {})},
            "output": "out",
            **changes,
        }
        return write("run.json", content)

    return make


def test_the_table_is_what_recipes_may_say():
    assert set(get_args(TaskName)) == set(TASKS)


def test_a_classifier_is_trained_with_its_head_and_comes_back(
    run: Run, recipe: Any, tmp_path: Path
):
    found = json.loads(run("train", recipe("classification", MOODS), "--json").stdout)
    assert found["best"]["eval_accuracy"] == 1.0
    model = hf_lora.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.id2label == {0: "bad", 1: "good"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for row in MOODS:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        assert model.config.id2label[int(logits.argmax())] == row["label"]


def test_an_encoder_with_numbers_for_labels(run: Run, recipe: Any, tmp_path: Path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, vocab_size=400)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    rows = [{**row, "label": 2 if row["label"] == "good" else 10} for row in MOODS]
    path = recipe("classification", rows, base=str(tmp_path / "bert"))
    found = json.loads(run("train", path, "--json", "--steps", 2).stdout)
    assert found["best"]["steps"] == 2
    model = hf_lora.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "2", 1: "10"}  # in numerical order


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], "every row has the label x"),
        ([{"text": "a", "label": 0.5}], "the label is float"),
        ([{"text": 1, "label": "x"}], "say the form: label"),
        ([{"text": "a"}], "looks like text (text); say the form: label"),
    ],
)
def test_labels_that_cannot_be_learned(run: Run, recipe: Any, rows: Any, told: str):
    data = {"form": "label"} if told.startswith("the label") else {}
    assert told in run("train", recipe("classification", rows, data=data), code=1).stderr


def test_a_label_that_is_only_evaluated_on(run: Run, recipe: Any, write: Write):
    write("other.jsonl", [{"text": "a", "label": "strange"}])
    path = recipe("classification", MOODS, data={"eval": "other.jsonl"})
    assert "no row to train on has the label strange" in run("train", path, code=1).stderr


def test_a_decoder_finds_the_last_token_by_the_padding(base: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad = tokenizer.pad_token_id
    rows: list[dict[str, Any]] = [
        {"input_ids": torch.tensor(ids).int().numpy(), "label": n}
        for n, ids in enumerate(([5, 6], [7, 8, 9]))
    ]
    batch = collate_labelled(rows, pad)
    assert batch["input_ids"].tolist() == [[5, 6, pad], [7, 8, 9]]
    assert batch["labels"].tolist() == [0, 1]
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, pad_token_id=pad).eval()
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        alone = model(input_ids=torch.tensor([[5, 6]])).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_preferences_are_learned_by_trl(run: Run, recipe: Any, tmp_path: Path, base: Path):
    pytest.importorskip("trl")
    path = recipe("dpo", PAIRS, trainer={"beta": 0.5, "steps": 30})
    found = json.loads(run("train", path, "--json").stdout)
    assert found["best"]["eval_accuracy"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(base)
    before = AutoModelForCausalLM.from_pretrained(base).eval()
    after = hf_lora.from_pretrained(tmp_path / "out").eval()

    def margin(model: Any, row: dict[str, str]) -> float:
        scores = []
        for name in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([[*prompt, *tokenizer(row[name])["input_ids"]]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logits.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            scores.append(picked.sum().item())
        return scores[0] - scores[1]

    assert all(margin(after, row) > margin(before, row) for row in PAIRS)


def test_a_reward_scores_the_better_answer_higher(run: Run, recipe: Any, tmp_path: Path):
    pytest.importorskip("trl")
    found = json.loads(run("train", recipe("reward", PAIRS), "--json").stdout)
    assert found["best"]["eval_accuracy"] == 1.0
    model = hf_lora.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_labels == 1
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(key.endswith("score.weight") for key in tensors)


def test_arguments_are_trls_where_the_trainer_is(run: Run, recipe: Any):
    pytest.importorskip("trl")
    told = run("train", recipe("dpo", PAIRS, trainer={"betta": 1}), code=1).stderr
    assert "trainer.betta: unknown field; did you mean beta?" in told
    told = run("train", recipe("dpo", PAIRS, trainer={"max_length": 1}), code=1).stderr
    assert "trainer.max_length: set data.max_length instead" in told
    told = run("train", recipe("classification", MOODS, trainer={"beta": 1}), code=1).stderr
    assert "trainer.beta: unknown field" in told
    told = run("train", recipe("poem", MOODS), code=1).stderr
    assert "task: 'poem' is not one of language-modeling, classification, reward, dpo" in told


def test_without_trl_it_is_named(run: Run, recipe: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    told = run("train", recipe("dpo", PAIRS), code=1).stderr
    assert "task: rewards and preferences are trained by TRL, which is not installed" in told


@pytest.mark.parametrize(("task", "rows"), [("classification", MOODS), ("dpo", PAIRS)])
def test_a_dry_run_shows_what_is_learned(run: Run, recipe: Any, task: str, rows: Any):
    shown = run("train", recipe(task, rows), "--dry-run").stdout
    if task == "classification":
        assert "| What a lovely morning.\n  | label: «good»" in shown
    else:
        assert "| chosen: «The inner size of the two matrices.»\n  | rejected: «It is" in shown
    assert "60" in shown.partition("steps: ")[2].split(",")[0]


def test_what_is_next_fits_the_task(run: Run, recipe: Any):
    told = run("train", recipe("classification", MOODS), "--steps", 1).stdout
    words = [line.split()[1] for line in told.split("next:\n")[1].splitlines()]
    assert words == ["show", "report", "push"]
