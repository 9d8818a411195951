"""What `import hf_lora` and its first use bring beside what a program has anyway."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = """
import json, sys
from transformers import AutoModelForCausalLM
before = set(sys.modules)
import hf_lora
hf_lora.wrap, hf_lora.LoRATrainerMixin, hf_lora.base_view
hf_lora.enable_auto()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
IMPORTER = """
import json, sys, traceback

class Watch:
    seen = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft":
            frames = [frame.filename for frame in traceback.extract_stack()]
            frames = [f for f in frames if "importlib" not in f and f != "<string>"]
            Watch.seen.append([name, frames[-1]])

sys.meta_path.insert(0, Watch())
import pathlib, tempfile
import hf_lora
from tests.integrations import training

folder = pathlib.Path(tempfile.mkdtemp())
training.run(folder, max_steps=2, save_steps=1)
training.run(folder / "again", str(folder / "checkpoint-1"), max_steps=2)
hf_lora.load(training.llama(), folder / "checkpoint-1")
print(json.dumps(Watch.seen))
"""


def run(code: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_that_takes_seconds_comes_with_it():
    """The machinery of models, Trainer and pipelines is imported by whoever uses it, not by us."""
    added = run(MODULES)
    costly = (
        "accelerate",
        "bitsandbytes",
        "peft",
        "torchao",
        "transformers.conversion_mapping",
        "transformers.core_model_loading",
        "transformers.generation",
        "transformers.modeling_utils",
        "transformers.pipelines",
        "transformers.quantizers",
        "transformers.trainer",
    )
    assert "hf_lora.integrations.trainer.patch" in added
    assert [name for name in added if name.startswith(costly)] == []
    assert sum(not name.startswith("hf_lora") for name in added) < 80


def test_whoever_imports_peft_it_is_not_us():
    """peft is installed here, and transformers imports it for Trainer."""
    seen = run(IMPORTER)
    assert seen
    assert [entry for entry in seen if "/hf_lora/" in entry[1]] == []
