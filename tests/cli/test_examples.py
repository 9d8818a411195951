"""Files and data sets become examples: reading, cutting, packing, holding out, batches."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_lora.errors import ConfigError
from hf_lora.recipes.data import Data, DataSet, Files
from hf_lora.recipes.dataset import Examples, collate, load_examples
from hf_lora.recipes.encoding import IGNORED
from hf_lora.recipes.rows import read_rows

CONFIG = LlamaConfig(vocab_size=400, max_position_embeddings=64)
ROWS = [{"text": f"row {number}, with a word or two"} for number in range(10)]


def data(*paths: Path, **fields: Any) -> Data:
    return Data(**{"form": "text", "train": Files(paths), **fields})


def load(tokenizer: PreTrainedTokenizerFast, wanted: Data, seed: int = 0) -> Examples:
    return load_examples(wanted, tokenizer, CONFIG, seed)


def texts(tokenizer: PreTrainedTokenizerFast, examples: list | None) -> list[str]:
    return [tokenizer.decode(e["input_ids"], skip_special_tokens=True) for e in examples or []]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", "folder"])
def test_every_kind_of_source_holds_the_same_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        # as spreadsheets write it: with a mark in front, and quotes around a comma
        lines = "".join(f'"{row["text"]}"\r\n' for row in ROWS)
        path.write_bytes(("\ufefftext\r\n" + lines).encode())
    elif kind == "txt":
        path.write_text("\n\n".join(row["text"] for row in ROWS) + "\n")
    else:
        path = tmp_path / ("folder" if kind == "folder" else "") / "train.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_list(ROWS).to_parquet(path)
    source = DataSet(dataset=str(path.parent)) if kind == "folder" else Files((path,))
    examples = load(tokenizer, data(train=source))
    assert texts(tokenizer, examples.train) == [row["text"] for row in ROWS]
    assert examples.counts.rows == 10


def test_a_text_file_by_line_paragraph_and_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n  \nfour")

    def rows(unit: str) -> list[str]:
        return [row["text"] for _, row in read_rows(Files((path,)), data(unit=unit))]

    assert rows("line") == ["one", "two", "three", "four"]
    assert rows("paragraph") == ["one\ntwo", "three", "four"]
    assert rows("file") == ["one\ntwo\n\n\nthree\n  \nfour"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]', "a.jsonl line 2 is list"),
        ("a.json", '{"text": "x"}', "holds dict, not a list"),
        ("a.csv", "text,more\na,b\nc\n", "a.csv line 3 has another number of columns"),
        ("a.csv", "text\na,b\n", "a.csv line 2 has another number of columns"),
        ("a.txt", b"\xff\xfe\x00", "a.txt cannot be read"),
        ("a.parquet", "no parquet", "a.parquet cannot be read"),
        ("a.jsonl", "", "data.train: there is nothing in it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, content: Any, words: str
):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words):
        load(tokenizer, data(path))


def test_all_faulty_rows_are_told_with_their_places(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    path = tmp_path / "a.jsonl"
    rows = [*ROWS[:2], {"txt": 1}, {"text": 7}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, data(path))
    assert str(caught.value).splitlines() == [
        "a.jsonl cannot be read as text:",
        "  - a.jsonl line 3: no column text; it has txt",
        "  - a.jsonl line 4: the text is int, not text",
    ]


def test_a_data_set_that_is_not_there(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(tokenizer, data(train=DataSet(dataset="nobody/nothing")))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="split other cannot be loaded"):
        load(tokenizer, data(train=DataSet(dataset=str(tmp_path), split="other")))


def test_without_the_library_datasets_only_what_needs_it_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load(tokenizer, data(tmp_path / "a.jsonl")).train
    with pytest.raises(ConfigError, match=r"a.parquet is read with .* pip install datasets"):
        load(tokenizer, data(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match="me/data is read with the library datasets"):
        load(tokenizer, data(train=DataSet(dataset="me/data")))


def test_long_rows_are_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * n}) for n in (3, 7, 8, 200)))
    examples = load(tokenizer, data(path, max_length=8))
    assert [len(e["input_ids"]) for e in examples.train] == [4, 8, 8, 8]
    assert examples.counts.cut == 2
    # by default what the base can read is the limit
    assert [len(e["input_ids"]) for e in load(tokenizer, data(path)).train] == [4, 8, 9, 64]
    with pytest.raises(ConfigError, match="65, but the base reads 64"):
        load(tokenizer, data(path, max_length=65))


def test_rows_with_nothing_left_to_learn_are_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "q" * 30, "completion": "a"}, {"prompt": "q", "completion": "a"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    wanted = data(path, form="completion", loss="completions", max_length=10)
    examples = load(tokenizer, wanted)
    assert texts(tokenizer, examples.train) == ["qa"]
    assert (examples.counts.dropped, examples.counts.cut) == (1, 1)


def test_packing_loses_no_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    apart = load(tokenizer, data(path)).train
    packed = load(tokenizer, data(path, packing=True, max_length=16)).train
    stream = [int(token) for e in apart for token in e["input_ids"]]
    assert [int(token) for e in packed for token in e["input_ids"]] == stream
    assert {len(e["input_ids"]) for e in packed[:-1]} == {16}
    assert all((e["input_ids"] == e["labels"]).all() for e in packed)
    assert stream.count(tokenizer.eos_token_id) == len(ROWS)


def test_held_out_rows_are_a_share_that_the_seed_decides(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    first, again, other = (load(tokenizer, data(path, eval=0.3), seed) for seed in (1, 1, 2))
    held = texts(tokenizer, first.eval)
    assert len(held) == 3
    assert sorted(held + texts(tokenizer, first.train)) == [row["text"] for row in ROWS]
    assert held == texts(tokenizer, again.eval)
    assert held != texts(tokenizer, other.eval)


def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the"}')
    small = LlamaConfig(vocab_size=100, max_position_embeddings=64)
    with pytest.raises(ConfigError, match="the base knows 100 tokens"):
        load_examples(data(path), tokenizer, small, 0)


def test_a_chat_needs_a_template(tmp_path: Path):
    from tests.tiny_base import tiny_tokenizer

    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        load(bare, data(form="chat"))


def test_a_batch_is_padded_without_touching_what_is_learned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "one two", "completion": " three"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    examples = load(tokenizer, data(path, form="completion", loss="completions")).train
    batch = collate(examples)
    for row, example in enumerate(examples):
        count = len(example["input_ids"])
        assert batch["input_ids"][row, :count].tolist() == example["input_ids"].tolist()
        assert batch["labels"][row, :count].tolist() == example["labels"].tolist()
        assert (batch["labels"][row, count:] == IGNORED).all()
        assert batch["attention_mask"][row].tolist() == [1] * count + [0] * (
            batch["input_ids"].shape[1] - count
        )
    assert batch["labels"].dtype == batch["input_ids"].dtype == torch.long
