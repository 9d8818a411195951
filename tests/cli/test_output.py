"""Ground rules of every command: quick help, exit codes, nothing but JSON on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_lora
from tests import forked
from tests.tiny_base import Run

COMMANDS = ("plan", "train", "show", "push", "pull")
ENTRY = "import sys; from hf_lora.cli.main import app; sys.argv[0] = 'hf-lora'; app()"


def test_help_is_quick_because_nothing_heavy_is_imported():
    """Torch and transformers take six seconds, and the rest of it a fraction of one."""
    probe = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub', 'numpy'}\n"
        "atexit.register(lambda: print('heavy', heavy & set(sys.modules), file=sys.stderr))\n"
    )
    command = [sys.executable, "-c", probe + ENTRY, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=True)
    for command in COMMANDS:
        assert command in done.stdout
    assert done.stderr == "heavy set()\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str):
    output = run(command, "--help").stdout
    assert "--json" in output
    assert "Usage" in output


def test_version(run: Run):
    assert run("--version").stdout == f"hf-lora {hf_lora.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["plan"], ["plan", "a", "b"], ["nonsense"], ["show", "x", "--nonsense"], ["pull", "x"]],
)
def test_wrong_usage_is_2(run: Run, arguments: list[str]):
    run(*arguments, code=2)


def test_in_a_process_stdout_is_one_document_and_a_refusal_ends_with_1(tmp_path: Path):
    """Whatever is printed underneath, by Python or below it, does not get between."""
    noise = (
        "import os, hf_lora.cli.commands.show as show; real = show.locate\n"
        "def locate(*args, **kwargs):\n"
        "    print('from Python'); os.write(1, b'from below\\n'); return real(*args, **kwargs)\n"
        "show.locate = locate\n"
    )
    done = forked.run_code(noise + ENTRY, "show", str(tmp_path), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "AdapterFileError"
    for words in ("from Python", "from below", "error: "):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
