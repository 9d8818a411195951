"""A base in a GGUF file: written here with random weights, planned and trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.tiny_base import Run

WIDTH, INNER, HEADS, LAYERS, WORDS = 32, 64, 4, 2, 400


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    """A folder with a GGUF file and nothing else."""
    place = tmp_path / "gguf"
    place.mkdir()
    writer = gguf.GGUFWriter(place / "tiny.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    _add_tokenizer(writer, base)
    shapes = {"token_embd.weight": (WORDS, WIDTH), "output.weight": (WORDS, WIDTH)}
    shapes["output_norm.weight"] = (WIDTH,)
    for layer in range(LAYERS):
        parts = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        parts |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH))
        parts |= {"ffn_down": (WIDTH, INNER)}
        parts |= dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,))
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, (0.2 * random.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def _add_tokenizer(writer: gguf.GGUFWriter, base: Path) -> None:
    """Put the tiny tokenizer's own words into the file, as converters do."""
    content = json.loads((base / "tokenizer.json").read_text())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {token["content"] for token in content["added_tokens"]}
    kinds = [gguf.TokenType.CONTROL if w in special else gguf.TokenType.NORMAL for w in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_eos_token_id(words.index("<|end|>"))
    writer.add_pad_token_id(words.index("<|pad|>"))


def test_plan_and_train(run: Run, folder: Path, tmp_path: Path, write: Callable[[str, Any], Path]):
    plan = json.loads(run("plan", folder, "--gguf-file", "tiny.gguf", "--r", 2, "--json").stdout)
    assert len(plan["targets"]) == 7 * LAYERS
    write("rows.jsonl", [{"text": "a small matrix"}, {"text": "a large one"}])
    recipe = write(
        "recipe.json",
        {
            "base": {"model": "gguf", "gguf_file": "tiny.gguf"},
            "data": {"form": "text", "train": "rows.jsonl"},
            "lora": {"r": 2},
            "trainer": {"max_steps": 2, "learning_rate": 1e-2},
            "output": "out",
        },
    )
    found = json.loads(run("train", recipe, "--json").stdout)
    assert found["best"]["steps"] == 2
    shown = json.loads(run("show", tmp_path / "out", "--json").stdout)
    assert shown["parameters"] == plan["parameters"]
    assert shown["dead"] == []
