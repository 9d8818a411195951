"""The shape of the package: imports go down, no cycles, nothing hidden, and every rule can fail."""

from pathlib import Path
from types import ModuleType

import pytest

import hf_lora
from tests.architecture_rules import (
    LAYERS,
    MOST_LINES,
    RANK,
    RULES,
    Package,
    Rule,
    cycles,
    direction,
    eager_imports,
    forbidden_imports,
    hidden_imports,
    long_files,
    missing_docstrings,
    name_tests,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def package() -> Package:
    return Package.read(ROOT / "hf_lora")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(package: Package, rule: Rule):
    assert rule(package) == []


def test_every_unit_of_the_layout_but_the_face_is_imported_by_something(package: Package):
    """The graph is not empty: each row below the top is really used by a row above it."""
    used = {package.modules[edge.target].unit for edge in package.internal}
    assert {unit for rank, row in enumerate(LAYERS) if rank < RANK["api"] for unit in row} <= used


@pytest.mark.parametrize("folder", ["tests", "examples"])
def test_files_beside_the_package_open_with_a_docstring_and_stay_short(folder: str):
    beside = Package.read(ROOT / folder)
    assert missing_docstrings(beside) == []
    assert long_files(beside) == []


def test_the_table_for_contributors_is_the_one_that_is_tested():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    block = text.split("do not know each other:\n\n```\n")[1].split("\n```")[0]
    rows = [tuple(line[:43].strip().split(" | ")) for line in block.splitlines()]
    assert rows[::-1] == list(LAYERS)


# Each faulty package: its files, and what the one broken rule must say about it.
CLEAN = {"__init__.py": "from hf_lora.model.patch import wrap", "model/patch.py": "import torch"}
FAULTS: list[tuple[Rule, dict[str, str], str]] = [
    (direction, {"layers/base.py": "from hf_lora.model.patch import wrap"}, "model stands above"),
    (direction, {"planning/a.py": "from ..files import b", "files/b.py": ""}, "must not know"),
    (
        direction,
        {"files/b.py": "from hf_lora.planning import a", "planning/a.py": ""},
        "must not know",
    ),
    (direction, {"hub/a.py": "from hf_lora import wrap"}, "hf_lora stands above hub"),
    (
        direction,
        {"targets.py": "def f():\n    import hf_lora.hub.a", "hub/a.py": ""},
        "above",
    ),
    (direction, {"utils/x.py": ""}, "'utils' is in no row"),
    (cycles, {"hub/a.py": "from hf_lora.hub import b", "hub/b.py": "from .a import f"}, "cycle"),
    (
        cycles,
        {"hub/__init__.py": "from .a import f", "hub/a.py": "from hf_lora.hub import g"},
        "cycle",
    ),
    (hidden_imports, {"hub/a.py": "def f():\n    import json"}, "json inside a function"),
    (hidden_imports, {"hub/a.py": "class C:\n  def f(self):\n    from . import b"}, "inside"),
    (eager_imports, {"hub/a.py": "import bitsandbytes.functional"}, "optional: quantized"),
    (eager_imports, {"hub/a.py": "from transformers.trainer import Trainer"}, "takes seconds"),
    (forbidden_imports, {"files/a.py": "from peft import LoraConfig"}, "imports peft"),
    (forbidden_imports, {"files/a.py": "def f():\n    import peft.utils"}, "imports peft.utils"),
    (
        forbidden_imports,
        {"files/a.py": "import importlib\nimportlib.import_module('peft')"},
        "peft",
    ),
    (missing_docstrings, {"hub/a.py": "# no docstring"}, "hf_lora.hub.a"),
    (long_files, {"hub/a.py": "x = 1\n" * (MOST_LINES + 1)}, "at most"),
    (name_tests, {"hub/a.py": "def f(name): return 'lora_' in name"}, "'lora_' in name"),
    (name_tests, {"hub/a.py": "def f(name): return '.lora_A.' not in name"}, "not in name"),
    (name_tests, {"hub/a.py": "def f(name): return name.startswith('lora_')"}, "startswith"),
]


def write_package(folder: Path, files: dict[str, str]) -> Package:
    for name, source in files.items():
        path = folder / "hf_lora" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if source.startswith("#") else f'"""Doc."""\n{source}\n')
    return Package.read(folder / "hf_lora")


@pytest.mark.parametrize(("rule", "files", "words"), FAULTS)
def test_a_planted_fault_is_seen_by_its_rule(
    tmp_path: Path, rule: Rule, files: dict[str, str], words: str
):
    problems = rule(write_package(tmp_path, CLEAN | files))
    assert len(problems) == 1
    assert words in problems[0]


def test_a_clean_package_passes_every_rule(tmp_path: Path):
    allowed = {
        "hub/trainer.py": "def f():\n    from transformers.trainer import Trainer",
        "files/peft_format.py": "def f(raw): return 'lora_alpha' in raw and 'lora_A' in {'lora_A'}",
        "config.py": "from .errors import ConfigError",
        "layers/a.py": "if TYPE_CHECKING:\n    from hf_lora.model import patch",
        "errors.py": "",
    }
    package = write_package(tmp_path, CLEAN | allowed)
    assert [problem for rule in RULES for problem in rule(package)] == []


def test_all_is_exactly_the_public_names():
    assert hf_lora.__all__ == hf_lora.public.__all__
    public = {
        name
        for name, value in vars(hf_lora).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert len(hf_lora.__all__) == len(set(hf_lora.__all__))
    assert set(hf_lora.__all__) - {"__version__"} == public


def test_no_package_hides_a_verb():
    """Importing hf_lora.x makes the import system set that attribute to the module."""
    inside = {path.stem for path in (ROOT / "hf_lora").iterdir()}
    assert inside >= {"merging", "config"}
    assert inside & set(hf_lora.__all__) == set()


def test_every_public_name_says_what_it_does():
    silent = [
        name
        for name in hf_lora.__all__
        if name != "__version__" and not (vars(hf_lora)[name].__doc__ or "").strip()
    ]
    assert silent == []
