"""A tiny base model and tokenizer on disk, and the command run in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_lora.cli.main import app

Run = Callable[..., Any]

EXAMPLES = Path(__file__).parents[1] / "hf_lora" / "recipes" / "examples"
CHATML = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|stop|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be written; merges from the examples."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|end|>", "<|start|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (EXAMPLES / "notes.txt").read_text()
    tokenizer.train_from_iterator(words.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>", "<|stop|>"],
    )
    fast.chat_template = CHATML
    return fast


def tiny_model(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        # ten times the usual: features that a few steps can learn from
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **fields}))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a model and its tokenizer, as `base.model` names one."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process: `run("plan", folder, code=1)` is its result, with `stdout`."""
    # the command silences transformers for as long as its process lives, and here others' tests
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    # where a terminal is said to be that wide, lines are broken
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments: Any, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
        return result

    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write rows as JSON lines, anything else as JSON (which is YAML), and text as it is."""

    def put(name: str, content: Any) -> Path:
        path = tmp_path / name
        if path.suffix == ".jsonl":
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return put
