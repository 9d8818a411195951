"""What is shipped, what it asks for, what its import costs, and the rules all tests run under."""

import importlib.metadata
import json
import re
import socket
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.architecture_rules import LAZY, Package

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(lines: list[str]) -> set[str]:
    return {canonical(Requirement(line).name) for line in lines}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


class TestWheel:
    def test_it_holds_the_package_and_nothing_else(self, wheel: zipfile.ZipFile):
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
        sources = {
            str(path.relative_to(ROOT))
            for path in (ROOT / "hf_lora").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert shipped == sources
        assert "hf_lora/py.typed" in shipped

    def test_it_carries_the_licence_and_the_readme(self, wheel: zipfile.ZipFile):
        (licence,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        text = wheel.read(metadata).decode()
        assert "License-Expression: Apache-2.0" in text
        assert text.endswith((ROOT / "README.md").read_text())

    def test_it_is_the_version_that_is_installed(self, wheel: zipfile.ZipFile):
        version = importlib.metadata.version("hf-lora")
        assert Path(wheel.filename or "").name.startswith(f"hf_lora-{version}-")


class TestDependencies:
    def test_every_import_is_declared(self):
        """What is imported eagerly is a dependency; what is imported lazily is in an extra."""
        package = Package.read(ROOT / "hf_lora")
        owners = importlib.metadata.packages_distributions()
        needed = distributions(PROJECT["dependencies"])
        extras = distributions(
            [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
        )
        foreign = {
            (edge.target.split(".")[0], edge.lazy)
            for edge in package.imports
            if edge.target.split(".")[0] not in sys.stdlib_module_names | {"hf_lora"}
        }
        undeclared = [
            name
            for name, lazy in sorted(foreign)
            if not {canonical(owner) for owner in owners.get(name, [])}
            & (needed | extras if lazy else needed)
        ]
        assert {name for name, _ in foreign} >= {"torch", "transformers"}
        assert undeclared == []

    def test_every_dependency_of_the_library_has_a_lower_bound_only(self):
        for line in PROJECT["dependencies"]:
            assert [part.operator for part in Requirement(line).specifier] == [">="], line


IMPORT = """
import json, sys, transformers.modeling_utils
before = set(sys.modules)
print("end of what transformers itself says", file=sys.stderr)
import hf_lora
first = set(sys.modules) - before
hf_lora.wrap
print(json.dumps([sorted(first), sorted(set(sys.modules) - before)]))
"""


def test_import_adds_nothing_costly_and_says_nothing():
    """Measured against transformers' own base, which every program with a model has loaded."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", IMPORT],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    first, added = map(set, json.loads(done.stdout))
    assert first == {"hf_lora", "hf_lora.version"}
    assert added >= {"hf_lora.public", "hf_lora.api"}
    assert added & {*LAZY, "peft", "trl", "typer"} == {"hf_lora.public"}
    assert done.stderr.endswith("end of what transformers itself says\n")


def test_the_command_exists():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="hf-lora")
    done = subprocess.run(
        [Path(sys.executable).with_name("hf-lora"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert entry.value == PROJECT["scripts"]["hf-lora"]
    for command in ("init", "plan", "train", "show", "push", "pull"):
        assert command in done.stdout


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in ('pip install "torch==2.13.0" -e ".[test]"', "pytest"):
        assert command in script
        assert re.search(rf"^(.*&& )?{re.escape(command)}( &&.*)?$", readme, re.MULTILINE), command
    assert "python examples/quickstart.py --quick" in script
    assert "python examples/quickstart.py" in readme
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


class TestGroundRules:
    """conftest.py's promises to every other test."""

    @pytest.mark.parametrize("url", ["http://example.com/", "http://192.0.2.1/"])
    def test_a_test_cannot_reach_the_network(self, url: str):
        with pytest.raises(RuntimeError, match="tried to reach the network"):
            urllib.request.urlopen(url, timeout=5)

    def test_a_test_can_reach_its_own_server(self):
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client,
        ):
            assert client.getpeername() == server.getsockname()

    def test_the_hub_is_offline_and_its_cache_is_empty(self):
        from huggingface_hub import constants

        assert constants.HF_HUB_OFFLINE
        assert not list(Path(constants.HF_HUB_CACHE).glob("models--*"))
