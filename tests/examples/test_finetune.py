"""The script that brings its own environment: what it asks for, and a run by uv from the wheel."""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.tiny_base import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "finetune.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# As PEP 723 has it.
BLOCK = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def asked() -> dict[str, Any]:
    found = BLOCK.search(SCRIPT.read_text())
    assert found is not None
    lines = found["content"].splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))


def test_it_asks_for_this_project_and_an_extra_of_it():
    said = asked()
    assert said["requires-python"] == PROJECT["requires-python"]
    (line,) = said["dependencies"]
    requirement = Requirement(line)
    assert requirement.name == PROJECT["name"]
    assert requirement.extras <= PROJECT["optional-dependencies"].keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
def test_uv_runs_it_from_the_wheel(tmp_path: Path):
    """What the wheel needs besides is taken from this environment: it has gigabytes."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{w}:", "completion": f" {w[::-1]}"} for w in ("rank", "alpha", "file")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    extras = PROJECT["optional-dependencies"]["train"]
    names = [Requirement(line).name for line in [*PROJECT["dependencies"], *extras]]
    never = [f"{name}; sys_platform == 'never'" for name in names]
    table = f'# [tool.uv]\n# override-dependencies = {json.dumps(never)}\n# ///\n"""Train'
    script = tmp_path / "finetune.py"
    script.write_text(SCRIPT.read_text().replace('# ///\n"""Train', table, 1))
    done = subprocess.run(
        [
            *("uv", "run", "--no-index", "--offline", "--no-config", "--python", sys.executable),
            *("--find-links", str(tmp_path / "dist"), str(script)),
            *("base", "rows.jsonl", "--epochs", "1", "--prompt", "rank:"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "UV_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join(site.getsitepackages()),
            "OMP_NUM_THREADS": "1",
        },
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adapter: 1 steps" in done.stdout
    assert "rank:" in done.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
