"""Rows as other tools write them: recognized, and encoded as the chat template has them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_lora.errors import ConfigError
from hf_lora.recipes.data import Data, DataSet, Files, as_data
from hf_lora.recipes.dataset import Examples, load_examples
from hf_lora.recipes.encoding import IGNORED, Encoder
from hf_lora.recipes.forms import RowFault, recognize
from tests.tiny_base import tiny_tokenizer

CONFIG = LlamaConfig(vocab_size=400, max_position_embeddings=256)
TOOLS = (
    "{% if tools %}<|start|>tools\n{% for t in tools %}{{ t.function.name }};{% endfor %}<|stop|>\n"
    "{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments.city }})]"
    "{% endfor %}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ASKED = {"role": "user", "content": "Rain?"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "rain", "arguments": {"city": "Rome"}}}],
}
TOOL = {"type": "function", "function": {"name": "rain"}}


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "chat", {}),
        ({"chat": [{"role": "user", "content": "a"}]}, "chat", {"messages": "chat"}),
        ({"conversations": [{"from": "human", "value": "a"}], "id": "7"}, "sharegpt", {}),
        (
            {"conversation": [{"from": "human", "value": "a"}]},
            "sharegpt",
            {"conversations": "conversation"},
        ),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", {}),
        ({"instruction": "a", "output": "b"}, "alpaca", {}),
        ({"prompt": "a", "completion": "b"}, "completion", {}),
        (
            {"question": "a", "answer": "b", "id": 3},
            "completion",
            {"prompt": "question", "completion": "answer"},
        ),
        ({"text": "a"}, "text", {}),
        ({"content": "a"}, "text", {"text": "content"}),
        ({"sentence": "a", "label": 1}, "label", {"text": "sentence"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", {}),
        ({"text": "a", "prompt": "b", "completion": "c"}, None, None),
        ({"a": "b"}, None, None),
        ({"messages": []}, None, None),
        ({}, None, None),
    ],
)
def test_the_form_is_told_from_the_columns(row: dict[str, Any], form: str | None, columns: Any):
    found = recognize(row)
    assert (found and found.form, found and found.columns) == (form, columns)


def encode(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **fields: Any) -> str:
    """What is read, with what is learned in brackets."""
    wanted = Data(**{"train": Files(()), "loss": "completions", **fields})
    found = Encoder(tokenizer, wanted)(row)
    shown = ""
    for number, (token, label) in enumerate(zip(found.input_ids, found.labels, strict=True)):
        begins = label != IGNORED and (number == 0 or found.labels[number - 1] == IGNORED)
        shown += ("«" if begins else "") + tokenizer.decode([token])
        ends = number + 1 == len(found.labels) or found.labels[number + 1] == IGNORED
        shown += "»" if label != IGNORED and ends else ""
    return shown


def test_sharegpt_is_the_chat_that_it_says(tokenizer: PreTrainedTokenizerFast):
    row = {
        "system": "Short.",
        "conversations": [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "No."}],
    }
    said = [{"role": "system", "content": "Short."}, ASKED, {"role": "assistant", "content": "No."}]
    as_chat = encode(tokenizer, {"messages": said}, form="chat")
    assert encode(tokenizer, row, form="sharegpt") == as_chat
    assert "<|start|>assistant\n«No.<|stop|>»" in as_chat


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([{"from": "martian", "value": "a"}], "turn 1 is from 'martian'; known: human, user"),
        ([{"from": "human"}], "turn 1 has no from and value"),
        ([], "not a list of some"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "{"}], "is not JSON"),
    ],
)
def test_turns_that_say_nothing(tokenizer: PreTrainedTokenizerFast, turns: Any, told: str):
    with pytest.raises(RowFault, match=told):
        encode(tokenizer, {"conversations": turns}, form="sharegpt")


def test_alpaca_is_a_chat_where_there_is_a_template(tokenizer: PreTrainedTokenizerFast):
    row = {"instruction": "Sum up.", "input": "Rain.", "output": "Wet."}
    asked = {"role": "user", "content": "Sum up.\n\nRain."}
    said = [asked, {"role": "assistant", "content": "Wet."}]
    assert encode(tokenizer, row, form="alpaca") == encode(
        tokenizer, {"messages": said}, form="chat"
    )
    bare = tiny_tokenizer()
    bare.chat_template = None
    shown = encode(bare, row, form="alpaca")
    assert shown.startswith("Below is an instruction that describes a task, paired with an input")
    assert shown.endswith(
        "### Instruction:\nSum up.\n\n### Input:\nRain.\n\n### Response:\n«Wet.<|end|>»"
    )
    shown = encode(bare, {**row, "input": ""}, form="alpaca")
    assert "describes a task. Write" in shown
    assert "### Input" not in shown


def test_prompts_from_templates(tokenizer: PreTrainedTokenizerFast):
    row = {"q": "Rain?", "n": 3, "completion": " No."}
    shown = encode(tokenizer, row, form="completion", prompt="{n}. {q}\n{{A}}:")
    assert shown == "3. Rain?\n{A}:« No.<|end|>»"
    both = {"prompt": "{q}", "completion": "It is {n}.", "system": "Short."}
    shown = encode(tokenizer, row, form="chat", **both)
    assert "<|start|>system\nShort.<|stop|>" in shown
    assert "<|start|>user\nRain?<|stop|>\n<|start|>assistant\n«It is 3.<|stop|>»" in shown
    with pytest.raises(RowFault, match="no column absent; it has q, n, completion"):
        encode(tokenizer, row, form="completion", prompt="{absent}")


@pytest.mark.parametrize("template", ["{q", "{q.a}", "{q!r}", "{q:>3}", "{}", "{q[0]}"])
def test_a_template_that_is_none_is_told_before_reading(template: str, tmp_path: Path):
    problems: list[str] = []
    (tmp_path / "a.jsonl").write_text("{}")
    as_data({"train": "a.jsonl", "form": "chat", "prompt": template}, tmp_path, problems)
    assert [problem.partition(":")[0] for problem in problems] == ["data.prompt"]


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_as_the_chat_template_has_them(as_text: bool):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS
    call: Any = json.loads(json.dumps(CALL))
    tools: Any = [TOOL]
    if as_text:  # OpenAI's way, and the way of tables
        call["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome"}'
        tools = json.dumps(tools)
    answer = [{"role": "tool", "content": "yes"}, {"role": "assistant", "content": "Yes."}]
    row = {"messages": [ASKED, call, *answer], "tools": tools}
    shown = encode(tokenizer, row, form="chat")
    assert shown.startswith("<|start|>tools\nrain;<|stop|>")
    assert "assistant\n«[rain(Rome)]<|stop|>»\n<|start|>tool\nyes" in shown
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "rain", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "Yes."},
    ]
    assert encode(tokenizer, {"conversations": turns, "tools": tools}, form="sharegpt") == shown


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        ("rain", "tool_calls of message 2 are not a list"),
        ([{"function": {}}], "a tool call of message 2 has no name"),
        ([{"function": {"name": "a", "arguments": "{"}}], "arguments .* is not JSON"),
    ],
)
def test_tool_calls_that_are_none(tokenizer: PreTrainedTokenizerFast, calls: Any, told: str):
    row = {"messages": [ASKED, {"role": "assistant", "tool_calls": calls}]}
    with pytest.raises(RowFault, match=told):
        encode(tokenizer, row, form="chat")


def test_a_table_gives_a_call_no_arguments_of_other_calls(tmp_path: Path):
    """Arrow fills every struct with the fields of all rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS.replace(".arguments.city", ".arguments | tojson")
    other: Any = json.loads(json.dumps(CALL))
    other["tool_calls"][0]["function"]["arguments"] = {"mood": "good"}
    rows = [{"messages": [ASKED, each]} for each in (CALL, other)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    wanted = Data(train=DataSet(dataset=str(tmp_path)), loss="completions")
    found = load_examples(wanted, tokenizer, CONFIG, 0).train
    shown = [tokenizer.decode(example["input_ids"]) for example in found]
    assert '({"city": "Rome"})' in shown[0]
    assert '({"mood": "good"})' in shown[1]


def mixed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, train: Any, **more: Any) -> Examples:
    problems: list[str] = []
    data = as_data({"train": train, **more}, tmp_path, problems)
    assert problems == []
    assert data is not None
    return load_examples(data, tokenizer, CONFIG, 1)


def test_several_sources_with_forms_and_shares(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    texts = [{"text": f"text {number}"} for number in range(20)]
    pairs = [{"question": f"q {number}", "answer": "yes"} for number in range(12)]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both: list[Any] = [{"path": "texts.jsonl"}, {"path": "pairs.jsonl"}]
    assert len(mixed(tokenizer, tmp_path, both).train) == 32
    assert len(mixed(tokenizer, tmp_path, ["texts.jsonl", {"path": "pairs.jsonl"}]).train) == 32
    both[0]["share"], both[1]["share"] = 0.25, 0.75
    found = mixed(tokenizer, tmp_path, both)
    shown = [tokenizer.decode(example["input_ids"]) for example in found.train]
    assert [sum(part in text for text in shown) for part in ("text ", "q ")] == [4, 12]
    assert found.counts.unused == 16
    assert len(set(shown)) == 16
    assert found.sources == (
        "texts.jsonl: 20 rows as text (text)",
        "pairs.jsonl: 12 rows as completion (question, answer)",
    )
    again = mixed(tokenizer, tmp_path, both)
    assert [tokenizer.decode(each["input_ids"]) for each in again.train] == shown


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ([{"path": "a.jsonl", "share": 0.5}, {"path": "a.jsonl"}], "either every source has a sh"),
        ([{"path": "a.jsonl", "share": 0}], "data.train, source 1.share: 0 is not a number above"),
        ([{"path": "b.jsonl"}], "data.train, source 1: there is no file"),
        ([{"path": "a.jsonl", "form": "poem"}], "source 1.form: 'poem' is not one of"),
        ([{"path": "a.jsonl", "columns": {"text": "t"}}], "source 1.columns: say the form, too"),
        ([{"path": "a.jsonl", "weight": 2}], "data.train, source 1.path: unknown field"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, train: Any, told: str):
    (tmp_path / "a.jsonl").write_text("{}")
    problems: list[str] = []
    assert as_data({"train": train}, tmp_path, problems) is None or problems
    assert told in problems[0]


def test_preferences_are_nothing_for_a_language_model(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    with pytest.raises(ConfigError, match="looks like preference"):
        mixed(tokenizer, tmp_path, "a.jsonl")
    with pytest.raises(ConfigError, match="preference is not one of text, completion"):
        mixed(tokenizer, tmp_path, "a.jsonl", form="preference")
