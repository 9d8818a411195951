"""The documentation builds strictly, its links resolve, and nothing in it comes from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

import pytest
import typer.main

import hf_lora
from hf_lora.cli.main import app
from tests.docs.pages import DOCS, pages

ROOT = DOCS.parents[1]


class Page(HTMLParser):
    """What a page links to, what it loads, and the places inside it."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.images_without_words: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given["href"])
        elif "src" in given:
            self.loads.append(given["src"])
        if tag == "img" and not given.get("alt"):
            self.images_without_words.append(given["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as HTML."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [*f"{sys.executable} -m mkdocs build --strict -f examples/mkdocs.yml -d".split(), folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_every_page_is_built(site: Path, built: dict[Path, Page]):
    assert {str(path.relative_to(site).with_suffix(".md")) for path in built} == set(pages())


def test_every_link_inside_resolves(built: dict[Path, Page]):
    for path, page in built.items():
        for link in [*page.links, *page.loads]:
            parts = urlparse(link)
            if parts.scheme in ("http", "https", "mailto") or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path.name, link)
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in built[target].places, (path.name, link)


def test_nothing_is_loaded_from_elsewhere(site: Path, built: dict[Path, Page]):
    for path, page in built.items():
        assert [load for load in page.loads if urlparse(load).netloc] == [], path
        assert page.images_without_words == [], path
        assert "fonts.googleapis" not in path.read_text()
    for path in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import )[\"']?(https?:|//)", path.read_text())
        assert found == [], path


def test_the_references_have_every_name_command_and_field(site: Path):
    python = (site / "reference/python.html").read_text()
    for name in hf_lora.__all__:
        assert name.startswith("_") or f'id="hf_lora.{name}"' in python, name
    commands = (site / "reference/cli.html").read_text()
    group = typer.main.get_command(app)
    for name in group.commands:  # type: ignore[attr-defined]
        assert f"hf-lora {name}" in commands, name
    recipe = (site / "reference/recipe.html").read_text()
    for name in ("max_length", "load_in_4bit", "train_rows", "repo_id", "revision"):
        assert f"<code>{name}</code>" in recipe, name
    assert ":class:" not in python + commands + recipe
    assert "<!-- generated" not in python + commands + recipe


def module(name: str) -> ModuleType:
    """Import one of the scripts beside the pages."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_pictures_are_what_the_script_draws():
    for name, drawn in module("draw").pictures():
        assert (DOCS / f"pictures/{name}.svg").read_text() == drawn, "python examples/docs/draw.py"
        assert f"pictures/{name}.svg" in (DOCS / "how-it-works.md").read_text()
