"""``hf-lora generate``, ``eval`` and ``chat``: what an adapter does, as the library does it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lora
from hf_lora.recipes.encoding import IGNORED
from tests.oracle.adapting import scramble
from tests.tiny_base import Run, tiny_model

Write = Callable[[str, Any], Path]
ROWS = [
    {"prompt": f"{word}:", "completion": f" {word[::-1]}"} for word in ("rank", "alpha", "file")
]
CHAT = [
    {"messages": [{"role": "user", "content": "rank"}, {"role": "assistant", "content": "knar"}]}
]


def adapter_of(base: Path, folder: Path, seed: int = 1) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    hf_lora.wrap(model, targets=["q_proj", "down_proj"], r=4)
    scramble(model)
    hf_lora.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(base, tmp_path_factory.mktemp("adapters") / "one")


def written(base: Path, adapter: Path | None, prompt: Any, most: int = 8) -> str:
    """What the library and transformers give, likeliest token by likeliest token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = hf_lora.load(model, adapter)
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    for _ in range(most):
        with torch.no_grad():
            token = model.eval()(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        if token.item() in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
            break
        ids = torch.cat([ids, token], 1)
    start = len(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else None
    if start is None:
        start = len(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        )
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_it_continues_prompts_with_the_adapter_and_without(run: Run, adapter: Path, base: Path):
    arguments = ["generate", adapter, "-p", "rank:", "-p", "The", "--max-new-tokens", 8]
    answers = json.loads(run(*arguments, "--compare", "--json").stdout)["answers"]
    assert [row["prompt"] for row in answers] == ["rank:", "The"]
    for row in answers:
        assert row["text"] == written(base, adapter, row["prompt"])
        assert row["base"] == written(base, None, row["prompt"])
    assert answers[0]["text"] != answers[0]["base"]
    text = run(*arguments, "--compare").stdout
    assert f"> rank:\n{answers[0]['text']}\nwithout the adapter: {answers[0]['base']}" in text


def test_one_answer_is_printed_alone(run: Run, adapter: Path, base: Path):
    printed = run("generate", adapter, "--prompt", "rank:", "--max-new-tokens", 8).stdout
    assert printed == written(base, adapter, "rank:") + "\n"


def test_through_the_chat_template(run: Run, adapter: Path, base: Path):
    arguments = ["generate", adapter, "-p", "rank", "--chat", "--max-new-tokens", 8, "--json"]
    (row,) = json.loads(run(*arguments).stdout)["answers"]
    assert row["text"] == written(base, adapter, [{"role": "user", "content": "rank"}])


def test_sampling_has_a_seed(run: Run, adapter: Path):
    def sampled(seed: int) -> str:
        arguments = ["generate", adapter, "-p", "rank", "--temperature", 2.0, "--seed", seed]
        return run(*arguments, "--max-new-tokens", 16).stdout

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_prompts_come_from_standard_input(run: Run, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from hf_lora.cli.main import app

    arguments = ["generate", str(adapter), "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(app, arguments, input="rank:\n\nThe\n")
    assert [row["prompt"] for row in json.loads(result.stdout)["answers"]] == ["rank:", "The"]
    refused = CliRunner().invoke(app, arguments, input="")
    assert refused.exit_code == 1
    assert "there is no prompt" in refused.stderr


def by_hand(base: Path, adapter: Path | None, rows: list[tuple[list[int], list[int]]]) -> tuple:
    """Loss and accuracy over learned tokens, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = (hf_lora.load(model, adapter) if adapter else model).eval().double()
    loss, right, count = 0.0, 0, 0
    for ids, labels in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        for row, label in zip(logits, labels[1:], strict=True):
            if label != IGNORED:
                loss -= row.log_softmax(-1)[label].item()
                right += int(row.argmax() == label)
                count += 1
    return loss / count, right / count


def test_it_measures_with_the_adapter_and_without(
    run: Run, adapter: Path, base: Path, write: Write
):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for row in ROWS:
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        answer = [*answer, tokenizer.eos_token_id]
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    data = write("rows.jsonl", ROWS)
    found = json.loads(run("eval", adapter, data, "--json", "--batch-size", 2).stdout)
    assert found["rows"] == len(ROWS)
    for name, used in (("adapter", adapter), ("base", None)):
        loss, accuracy = by_hand(base, used, rows)
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found[name]["accuracy"] == accuracy
    assert found["base"]["loss"] != found["adapter"]["loss"]
    text = run("eval", adapter, data).stdout
    assert f"{found['adapter']['loss']:.4f}" in text
    assert f"{found['base']['loss']:.4f}" in text


@pytest.mark.parametrize(
    ("name", "content", "arguments"),
    [
        ("rows.jsonl", CHAT, []),
        ("rows.jsonl", [{"text": "a rank"}], []),
        ("rows.txt", "a rank\nan alpha\n", []),
        ("rows.jsonl", [{"text": "a", "prompt": "a", "completion": "b"}], ["--form", "text"]),
    ],
)
def test_the_form_is_told_from_the_columns(
    run: Run, adapter: Path, write: Write, name: str, content: Any, arguments: list[str]
):
    assert json.loads(run("eval", adapter, write(name, content), *arguments, "--json").stdout)


@pytest.mark.parametrize(
    ("name", "content", "arguments", "told"),
    [
        ("rows.jsonl", [{"question": "a"}], [], "say the form: text, completion, chat"),
        ("rows.jsonl", [{"text": "a", "prompt": "a", "completion": "b"}], [], "say the form"),
        ("rows.jsonl", [{"text": "a b"}], ["--form", "poem"], "'poem' is not one of"),
        ("rows.jsonl", [], [], "the columns none"),
    ],
)
def test_data_that_cannot_be_used(
    run: Run, adapter: Path, write: Write, name: str, content: Any, arguments: list, told: str
):
    assert told in run("eval", adapter, write(name, content), *arguments, code=1).stderr


def test_a_file_that_is_not_there(run: Run, adapter: Path):
    assert "there is no file" in run("eval", adapter, "absent.jsonl", code=1).stderr


def talk(lines: str, *arguments: Any) -> tuple[list[dict[str, str]], str]:
    """What a chat's turns were, and what it said on standard error."""
    from typer.testing import CliRunner

    from hf_lora.cli.main import app

    every = ["chat", *map(str, arguments), "--max-new-tokens", "8", "--json"]
    result = CliRunner().invoke(app, every, input=lines)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["turns"], result.stderr


def test_a_chat_remembers_and_can_be_told_to_forget(adapter: Path, base: Path):
    turns, _ = talk("rank\nalpha\n/reset\nalpha\n/quit\nnever\n", adapter)
    assert [turn["prompt"] for turn in turns] == ["rank", "alpha", "alpha"]
    first = [{"role": "user", "content": "rank"}]
    assert turns[0]["text"] == written(base, adapter, first)
    second = [*first, {"role": "assistant", "content": turns[0]["text"]}]
    second.append({"role": "user", "content": "alpha"})
    assert turns[1]["text"] == written(base, adapter, second)
    assert turns[2]["text"] == written(base, adapter, [{"role": "user", "content": "alpha"}])


def test_the_base_answers_and_the_adapter_again(adapter: Path, base: Path):
    turns, told = talk("/base\nrank\n/base\nrank\n", adapter)
    said = [{"role": "user", "content": "rank"}]
    assert [turn["by"] for turn in turns] == ["base", "default"]
    assert turns[0]["text"] == written(base, None, said)
    assert turns[1]["text"] == written(base, adapter, said)
    assert "from the base alone" in told


def test_two_adapters_answer_side_by_side(adapter: Path, base: Path, tmp_path: Path):
    other = adapter_of(base, tmp_path / "two", seed=5)
    turns, told = talk(f"rank\n/use {other}\nrank\n/use neither\n", adapter, other)
    said = [{"role": "user", "content": "rank"}]
    assert [turn["by"] for turn in turns] == ["default", "adapter2", "adapter2"]
    assert turns[0]["text"] == written(base, adapter, said)
    assert turns[1]["text"] == written(base, other, said)
    assert "there is no 'neither'" in told


def test_a_system_prompt_and_unknown_words(adapter: Path, base: Path):
    turns, told = talk("/help\n/made-up\nrank\n", adapter, "--system", "small")
    messages = [{"role": "system", "content": "small"}, {"role": "user", "content": "rank"}]
    assert turns[0]["text"] == written(base, adapter, messages)
    assert "/base" in told
    assert "there is no /made-up" in told


def test_no_chat_without_a_template(run: Run, base: Path, tmp_path: Path):
    bare = tmp_path / "base"
    tiny_model().save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    adapter = adapter_of(bare, tmp_path / "adapter")
    assert "no chat template" in run("chat", adapter, code=1).stderr
    assert run("generate", adapter, "-p", "rank", "--max-new-tokens", 2).stdout


def test_the_tokenizer_beside_the_adapter_comes_first(
    run: Run, adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = adapter_of(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    arguments = ["generate", folder, "-p", "rank", "--chat", "--max-new-tokens", 8]
    assert run(*arguments).stdout == written(base, folder, "rank") + "\n"


def test_another_base(run: Run, adapter: Path, base: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    arguments = ["generate", adapter, "-p", "rank:", "--base", moved, "--max-new-tokens", 8]
    assert run(*arguments).stdout == written(base, adapter, "rank:") + "\n"


def test_what_writes_no_text_is_refused(run: Run, base: Path, tmp_path: Path):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(base, pad_token_id=0)
    model.save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    hf_lora.save(hf_lora.wrap(model, "q_proj", r=2), tmp_path / "adapter")
    told = run("generate", tmp_path / "adapter", "-p", "a", code=1).stderr
    assert "causal language model" in told


def test_streams_go_to_standard_output_as_they_come(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from hf_lora.cli.commands import use

    monkeypatch.setattr("sys.stdin", io.StringIO("rank\n"))
    use.chat([str(adapter)], system=None, most=8, temperature=0.0)
    said = written(base, adapter, [{"role": "user", "content": "rank"}])
    assert capsys.readouterr().out.strip() == said.strip()
