"""A process with the real client and hf_lora in it, which runs one piece of code after another.

Its Hub is a server of the test. Importing transformers costs seconds, and the client reads its
endpoint when it is imported: so one process for many tests, and not this one. It is a fork that has
imported torch, but nothing of the Hub.
"""

import json
import os
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import forked
from tests.hub_server import HubServer, hub_environment

# What every piece of code may use.
PRELUDE = """
import json, os, shutil, warnings
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)

import hf_lora

torch.set_num_threads(1)
IDS = torch.tensor([[2, 3, 5, 7, 11]])

def tiny_model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)).eval()

def tiny_tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "Once", "upon", "a", "time"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")

def adapted(base="user/base", seed=1, r=4, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(seed)
    hf_lora.wrap(model, ["q_proj", "v_proj"], r=r, **kwargs)
    return stirred(model, seed)

def stirred(model, seed=1):
    # an adapter that does something, as after training
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model

def logits(model):
    with torch.no_grad():
        return model(IDS).logits

def outcome(call, *args, **kwargs):
    # "HubError: text" instead of the value, if it raises
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def told(call, *args, **kwargs):
    # the value, and what it warned of
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call(*args, **kwargs)
    return value, [str(w.message) for w in caught if w.category is hf_lora.HfLoRAWarning]
"""

# Runs in the process: a line of JSON in, a line of JSON out, and what is printed goes to the log.
_LOOP = """
import json, os, sys, traceback

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
names = {"__name__": "__main__"}
exec(json.loads(sys.stdin.readline()), names)
for line in sys.stdin:
    code, values = json.loads(line)
    reported = []
    try:
        exec(compile(code, "<test>", "exec"), {**names, **values, "report": reported.append})
        answer = {"reported": reported}
    except BaseException:
        answer = {"failed": traceback.format_exc()}
    answers.write(json.dumps(answer) + "\\n")
"""


class Worker:
    """The process; what a piece of code gives to `report` comes back from `run`."""

    def __init__(self, hub: HubServer, home: Path, **environment: Any):
        self.home = home
        self._work = home / "work"
        self._work.mkdir(parents=True)
        self._log = home / "output"
        questions, write_end = os.pipe()
        read_end, answers = os.pipe()
        with open(self._log, "w") as output:
            self._process = forked.Process(
                "tests.fork_server:script",
                _LOOP,
                stage="torch",
                env=hub_environment(hub, home, **environment),
                cwd=self._work,
                stdin=questions,
                stdout=answers,
                stderr=output,
            )
        for end in (questions, answers):
            os.close(end)
        self._questions, self._answers = os.fdopen(write_end, "w"), os.fdopen(read_end)
        self._send(PRELUDE)

    def run(self, code: str, /, **values: Any) -> Any:
        """Run code, whose variables `values` are (paths become text), and return its report."""
        given = {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}
        self._send([textwrap.dedent(code), given])
        line = self._answers.readline()
        assert line, f"the process ended with status {self._process.wait()}\n{self.output}"
        answer = json.loads(line)
        assert "failed" not in answer, f"{answer['failed']}\n--- code\n{code}"
        assert len(answer["reported"]) <= 1, "report was called more than once"
        return next(iter(answer["reported"]), None)

    @property
    def output(self) -> str:
        """Everything that the process has printed."""
        return self._log.read_text()

    def close(self) -> None:
        self._questions.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _send(self, message: Any) -> None:
        self._questions.write(json.dumps(message) + "\n")
        self._questions.flush()


@contextmanager
def working(hub: HubServer, home: Path, **environment: Any) -> Iterator[Worker]:
    """A worker until the end of the block; keywords are those of `hub_environment`."""
    worker = Worker(hub, home, **environment)
    try:
        yield worker
    finally:
        worker.close()


def seed_base(hub: HubServer, worker: Worker, repo_id: str = "user/base") -> None:
    """Put a tiny Llama with its tokenizer on the Hub."""
    folder = worker.home / "base"
    worker.run("tiny_model().save_pretrained(at); tiny_tokenizer().save_pretrained(at)", at=folder)
    hub.add_repo(repo_id, folder=folder)
