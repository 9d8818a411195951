"""The README tells the truth: its Python runs as written, each of its commands is run somewhere.

Its Python runs against a Hub on loopback that has a tiny model under the real one's name. The
shell commands are run by .ci/run and by the tests named here.
"""

import re
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from tests.hub_server import HubServer, hub_environment, run_python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

BEFORE = """
import os, torch
from transformers import TrainingArguments
os.chdir(folder)
args = TrainingArguments("out", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
                         report_to=[], disable_tqdm=True, use_cpu=True)
data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
"""
AFTER = """
report({"files": sorted(os.listdir("my-adapter")), "class": type(model).__name__,
        "adapters": list(hf_lora.adapters(model))})
"""

# Every command of the README, and what runs it.
COMMANDS = {
    'pip install "torch==2.13.0" -e ".[quickstart]" && python examples/quickstart.py': (
        ".ci/run",
        "python examples/quickstart.py --quick",
    ),
    'pip install "torch==2.13.0" -e ".[test]" && pytest': (".ci/run", "pytest"),
    "hf-lora --help": ("tests/test_package.py", '"--help"'),
    "hf-lora export my-adapter": ("tests/clients/test_export.py", 'run("export", tmp_path'),
    "hf-lora merge my-adapter -o merged --verify": (
        "tests/cli/test_merge.py",
        '"merge", adapter, "-o", tmp_path / "merged", "--verify"',
    ),
    "hf-lora eval my-adapter rows.jsonl": ("tests/cli/test_use.py", 'run("eval", adapter, data'),
    "hf-lora chat my-adapter": ("tests/cli/test_use.py", '["chat", *map(str, arguments)'),
    "hf-lora init MODEL rows.jsonl -o run.yaml": (
        "tests/cli/test_init.py",
        'run("init", base, data, "-o", recipe',
    ),
    "hf-lora train run.yaml": ("tests/cli/test_init.py", 'run("train", recipe'),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_its_python_runs_as_it_stands(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    (block,) = blocks("python")
    code = block.replace('"me/', '"user/')
    with HubServer() as hub:
        hub.add_repo(BASE, folder=tmp_path / "base")
        done = run_python(
            BEFORE + code + AFTER,
            hub_environment(hub, tmp_path),
            folder=str(tmp_path),
        )
        pushed = set(hub.files("user/my-adapter", "main"))
    assert done.value == {
        "files": ["adapter_config.json", "adapter_model.safetensors"],
        "class": "LlamaForCausalLM",
        "adapters": ["default"],
    }
    assert pushed >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_each_of_its_commands_is_run_by_something():
    commands = [
        re.sub(r"\s+#.*", "", line) for block in blocks("bash") for line in block.splitlines()
    ]
    assert sorted(commands) == sorted(COMMANDS)
    for file, words in COMMANDS.values():
        assert words in (ROOT / file).read_text(), file


def test_the_files_that_it_names_are_there():
    named = re.findall(r"`((?:examples|\.github)/[\w./]*)`", README)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(linked) >= 5
    for name in [*named, *linked]:
        assert (ROOT / name).exists(), name


def test_it_is_one_screen_and_a_half():
    assert len(README.splitlines()) <= 95
