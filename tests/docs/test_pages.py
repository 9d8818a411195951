"""Every block of code in the documentation runs, or stands in the table of those that do not."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import bases
from tests.docs.pages import DOCS, LIST, blocks, commands, not_run, pages
from tests.hub.hub_worker import Worker, working
from tests.hub_server import HubServer

PROJECT = tomllib.loads((DOCS.parents[1] / "pyproject.toml").read_text())["project"]
ELSEWHERE = {"coming-from-peft.md": "tests/docs/test_coming_from_peft.py runs its pairs"}
RUN = [page for page in pages() if page not in ELSEWHERE and blocks(page)]

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A process in which pages run one after the other, and a Hub with models for them."""
    with (
        HubServer() as hub,
        working(hub, tmp_path_factory.mktemp("client"), COLUMNS="80") as worker,
    ):
        folder = tmp_path_factory.mktemp("bases")
        worker.run("from tests.docs import bases; bases.write_all(at)", at=folder)
        for repo_id in bases.MODELS:
            hub.add_repo(repo_id, folder=folder / repo_id)
        yield worker


@pytest.mark.parametrize("page", RUN)
def test_a_page_runs(page: str, process: Worker, tmp_path: Path):
    skip = [words for where, words in not_run() if where == page]
    process.run(
        "from tests.docs.pages import run_page; run_page(page, at, skip)",
        page=page,
        at=tmp_path,
        skip=skip,
    )


def test_what_is_not_run_is_there_and_has_a_reason():
    for (page, words), why in not_run().items():
        there = {block.first for block in blocks(page)}
        there |= {line for b in blocks(page) if b.language == "bash" for line in commands(b.code)}
        assert words in there, (page, words)
        assert why.strip()


def test_extras_that_the_pages_install_are_those_of_the_project():
    text = "\n".join((DOCS / page).read_text() for page in pages())
    found = re.findall(r"-e \"\.\[([\w,]+)\]\"", text)
    named = {name for names in found for name in names.split(",")}
    assert named
    assert named <= set(PROJECT["optional-dependencies"])


def test_files_that_they_name_are_there():
    for page in pages():
        text = (DOCS / page).read_text()
        for name in re.findall(r"`((?:examples|\.github|hf_lora|tests)/[\w./]+)`", text):
            assert (DOCS.parents[1] / name).exists(), (page, name)


def test_python_blocks_are_lines_that_a_phone_can_show_and_need_no_names_from_nowhere():
    for page in pages():
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.code)
                assert max(map(len, block.code.splitlines())) <= 100, (page, block.line)
    assert LIST in pages()
