"""What is shipped, what it asks for, what its import costs, and the rules all tests run under."""

import importlib.metadata
import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.architecture_rules import LAZY, Package

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(lines: list[str]) -> set[str]:
    return {canonical(Requirement(line).name) for line in lines}


def build(kind: str, folder: Path, source: Path = ROOT) -> Path:
    """Build a wheel or an sdist into a folder, without a network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive of sources."""
    archive = build("sdist", tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


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

    def test_it_carries_the_recipes_that_init_copies(self, wheel: zipfile.ZipFile):
        there = set(wheel.namelist())
        for name in ("chat.yaml", "chat.jsonl", "completion.yaml", "opposites.jsonl", "text.yaml"):
            assert f"hf_lora/recipes/examples/{name}" in there

    def test_its_readme_is_rendered_as_the_index_would(self):
        markdown = pytest.importorskip("readme_renderer.markdown")
        shown = markdown.render((ROOT / "README.md").read_text())
        assert shown is not None
        assert "<table>" in shown
        assert "<pre" in shown

    def test_its_addresses_begin_with_one_of_them(self, wheel: zipfile.ZipFile):
        urls = PROJECT["urls"]
        assert {"Source", "Documentation", "Changelog", "Issues"} <= set(urls)
        assert all(url.startswith(urls["Source"]) for url in urls.values())
        (metadata,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        for label, url in urls.items():
            assert f"Project-URL: {label}, {url}\n" in wheel.read(metadata).decode()

    def test_it_is_the_version_that_is_installed(self, wheel: zipfile.ZipFile):
        version = importlib.metadata.version("hf-lora")
        assert Path(wheel.filename or "").name.startswith(f"hf_lora-{version}-")


class TestSdist:
    def test_it_has_what_a_reader_of_the_sources_needs(self, sdist: Path):
        top = {path.name for path in sdist.iterdir()}
        assert top >= {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "hf_lora", "tests"}
        for name in ("examples/quickstart.py", "examples/mkdocs.yml", "examples/docs/index.md"):
            assert (sdist / name).is_file(), name

    def test_it_has_nothing_that_git_does_not_have(self, sdist: Path):
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        if listed.returncode:
            pytest.skip("not a checkout of git")
        found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
        assert found - set(listed.stdout.splitlines()) == {"PKG-INFO"}

    def test_the_wheel_that_it_makes_is_the_wheel(
        self, sdist: Path, wheel: zipfile.ZipFile, tmp_path: Path
    ):
        copy = shutil.copytree(sdist, tmp_path / "copy")
        made = zipfile.ZipFile(build("wheel", tmp_path / "made", copy))
        assert {i.filename: i.CRC for i in made.infolist()} == {
            i.filename: i.CRC for i in wheel.infolist()
        }


class TestBesideTheCode:
    """What GitHub and the index show of the project."""

    def test_the_changelog_and_the_citation_know_the_version(self):
        version = importlib.metadata.version("hf-lora")
        log = (ROOT / ".github/CHANGELOG.md").read_text()
        versions = re.findall(r"^## (\d+\.\d+\.\d+)", log, re.MULTILINE)
        assert versions[0] == version
        assert versions == sorted(versions, key=lambda v: [*map(int, v.split("."))], reverse=True)
        cited = yaml.safe_load((ROOT / ".github/CITATION.cff").read_text())
        assert cited["version"] == version
        assert cited["license"] == PROJECT["license"]
        assert cited["repository-code"] == PROJECT["urls"]["Source"]

    def test_issue_templates_are_forms_of_github(self):
        for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
            form = yaml.safe_load(path.read_text())
            if path.name == "config.yml":
                assert set(form) <= {"blank_issues_enabled", "contact_links"}
                continue
            assert {"name", "description", "body"} <= set(form)
            kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
            assert {part["type"] for part in form["body"]} <= kinds
            ids = [part["id"] for part in form["body"] if "id" in part]
            assert len(ids) == len(set(ids))

    def test_a_security_policy_says_where_to_tell(self):
        assert "Report a vulnerability" in (ROOT / ".github/SECURITY.md").read_text()


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
