"""The documentation's pages as programs: their blocks in order, one session for each page.

A block of Python without a title continues the page's session; one with a title is a file, as are
blocks of YAML, JSON and text with one. Shell blocks are commands: ``hf-lora`` runs in this process,
``python`` and ``torchrun`` in others. A block of text without a title is what the block before it
has printed, in part, where ``...`` stands for anything.
"""

import contextlib
import dataclasses
import doctest
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parents[2] / "examples/docs"
LIST = "what-is-run.md"
"""The page whose table says what is not run, and why."""

_FENCE = re.compile(r"^( *)```(\w*)(?: title=\"(.*?)\")?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"^\| \[.*?\]\((.*?)\) \| `(.*?)` \| (.*) \|$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code as it stands on a page."""

    language: str
    title: str
    code: str
    line: int

    @property
    def first(self) -> str:
        """The first line of the code."""
        return self.code.split("\n", 1)[0]


def pages() -> list[str]:
    """Return the pages by their paths below the documentation's folder."""
    return sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = (DOCS / page).read_text()
    found = []
    for match in _FENCE.finditer(text):
        indent, language, title, code = match.groups()
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        found.append(Block(language, title or "", code, text.count("\n", 0, match.start(4)) + 1))
    return found


def not_run() -> dict[tuple[str, str], str]:
    """Return (page, first line of a block, or a command) and why it is not run."""
    rows = _NOT_RUN.findall((DOCS / LIST).read_text())
    return {(page, words): why for page, words, why in rows}


def commands(code: str) -> Iterator[str]:
    """Yield the commands of a shell block, without what is a comment."""
    for line in code.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s+)#.*", "", line).strip()
        if line:
            yield " ".join(line.split())


def run_page(page: str, folder: str, skip: list[str]) -> None:
    """Run a page in a folder; raise at the first block that fails, saying which it is."""
    os.chdir(folder)
    session: dict[str, Any] = {"__name__": "__page__"}
    said = ""
    for block in blocks(page):
        where = f"{page}, line {block.line}"
        try:
            if block.first in skip:
                _parse(block)
            elif block.title:
                _parse(block)
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.code)
            elif block.language == "python":
                said = _printed(lambda block=block: _execute(block, session))
            elif block.language == "bash":
                said = "".join(run(each) for each in commands(block.code) if each not in skip)
            elif block.language == "text":
                _compare(block.code, said)
            else:
                _parse(block)
        except BaseException as error:
            raise AssertionError(f"{where}:\n{block.code}") from error


def _parse(block: Block) -> None:
    """Fail where a block is no text of its language."""
    match block.language:
        case "python":
            compile(block.code, block.title or "block", "exec")
        case "json":
            json.loads(block.code)
        case "jsonl":
            for line in block.code.splitlines():
                json.loads(line)
        case "yaml":
            yaml.safe_load(block.code)
        case "bash":
            for line in commands(block.code):
                shlex.split(line)
        case "text" | "dockerfile":
            pass
        case _:
            raise ValueError(f"blocks of {block.language!r} are nothing that is known here")


def _execute(block: Block, session: dict[str, Any]) -> None:
    name = f"<line {block.line}>"
    exec(compile(block.code, name, "exec"), session)


def _printed(call: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        call()
    return out.getvalue()


def run(command: str) -> str:
    """Run a command of a page and return what it has printed."""
    from typer.testing import CliRunner

    from hf_lora.cli.main import app

    command, _, source = command.partition(" < ")
    head, _, rest = command.partition(" | ")
    if head.startswith("echo "):
        command, text = rest, " ".join(shlex.split(head)[1:]) + "\n"
    else:
        text = Path(source.strip()).read_text() if source else None
    words = shlex.split(command)
    if words[0] == "hf-lora":
        done = CliRunner().invoke(app, words[1:], input=text)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code:
            raise AssertionError(f"{command}: exit code {done.exit_code}\n{done.output}")
        return done.output
    if words[0] == "pip":
        return ""
    if words[0] == "python":
        return _printed(lambda: _as_main(words[1:]))
    if words[0] in ("torchrun", "accelerate"):
        module = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
        rest = words[1:] if words[0] == "torchrun" else words[2:]
        called = [sys.executable, "-m", module[words[0]], *rest]
        ended = subprocess.run(called, capture_output=True, text=True, check=False, timeout=400)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout
    raise AssertionError(f"{command}: neither run nor in the table of {LIST}")


def _as_main(words: list[str]) -> None:
    before = sys.argv[:], sys.path[:]
    sys.argv[:], sys.path[:0] = words, [str(Path(words[0]).parent.resolve())]
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv[:], sys.path[:] = before


def _compare(wanted: str, got: str) -> None:
    """Fail unless the lines are in the output, in one piece."""
    checker = doctest.OutputChecker()
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not checker.check_output(f"...{wanted.strip()}...", got, flags):
        raise AssertionError(f"it printed\n{got}")
