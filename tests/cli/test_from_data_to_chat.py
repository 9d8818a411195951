"""From a file in ShareGPT's form to a chat and a merged model: five commands, a real model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples import assets

ROOT = Path(__file__).parents[2]
ANSWER = "Aye, captain."
ROWS = [
    {
        "conversations": [
            {"from": "human", "value": f"Is the {word} ready?"},
            {"from": "gpt", "value": ANSWER},
        ]
    }
    for word in ("ship", "boat", "crew", "sail", "map", "food", "rope", "flag")
]
# Neither hf_lora nor PEFT: what somebody has who was given the folder.
ELSEWHERE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("merged")
model = AutoModelForCausalLM.from_pretrained("merged").eval()
said = [{"role": "user", "content": "Is the anchor ready?"}]
batch = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt",
                                      return_dict=True)
ids = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1]:]
assert "hf_lora" not in sys.modules and "peft" not in sys.modules
print(json.dumps([type(model).__name__, tokenizer.decode(ids, skip_special_tokens=True)]))
"""


def python(arguments: list[str], folder: Path, words: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=words,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_commands(tmp_path: Path):
    def command(*words: Any, said: str | None = None) -> Any:
        line = ["-m", "hf_lora", *map(str, words), "--json"]
        return json.loads(python(line, tmp_path, said))

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = command("init", assets.smollm2(), "rows.jsonl", "-o", "run.yaml")
    assert found["form"] == "sharegpt"

    short = ["--steps", 8, "--lr", "2e-3", "--batch-size", 4, "--set", "base.dtype=float32"]
    trained = command("train", "run.yaml", *short, "-o", "adapter")
    assert trained["best"]["steps"] == 8

    dtype = ["--dtype", "float32", "--max-new-tokens", 8]
    question = "Is the anchor ready?\n"
    (turn,) = command("chat", "adapter", *dtype, said=question)["turns"]
    assert turn["text"] == ANSWER
    (turn,) = command("chat", "adapter", *dtype, said=f"/base\n{question}")["turns"]
    assert turn["text"] != ANSWER

    merged = command("merge", "adapter", "-o", "merged", "--dtype", "float32")
    assert merged["directory"] == "merged"
    assert json.loads(python(["-c", ELSEWHERE], tmp_path)) == ["LlamaForCausalLM", ANSWER]
