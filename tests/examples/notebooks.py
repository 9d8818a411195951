"""Notebooks are run from top to bottom, and committed with their outputs so that they can be read.

Committed outputs have neither execution counts nor messages on stderr.
"""

import os
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
_DEEPSPEED = re.compile(r"^\[[^\n]*\[real_accelerator\.py:[^\n]*\n", re.MULTILINE)
"""What DeepSpeed says of the machine when it is imported, on stdout, where it is installed."""

VARIES = "varies"
"""Tag of cells whose output depends on the processor: they are checked by their meaning."""


def read(path: Path) -> nbformat.NotebookNode:
    """Return a notebook as it is committed."""
    return nbformat.read(path, as_version=4)


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Execute every cell; raise at the first that fails."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    client = NotebookClient(
        notebook,
        timeout=1500,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    return client.execute(env=environment)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what differs from run to run, and what only says how this machine is set up."""
    for cell in code_cells(notebook):
        cell.execution_count = None
        cell.metadata.pop("execution", None)
        outputs = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if output.output_type == "stream":
                output.text = _DEEPSPEED.sub("", output.text)
                if outputs and outputs[-1].output_type == "stream":
                    outputs[-1].text += output.text
                    continue
            if output.output_type == "execute_result":
                output.execution_count = None
            outputs.append(output)
        cell.outputs = outputs
    # which Python it ran on is nobody's business
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    """Return what a cell wrote to stdout."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell: nbformat.NotebookNode) -> list[str]:
    """Return the cell's PNG images as they are stored."""
    shown = [output.data for output in cell.outputs if output.output_type == "display_data"]
    return [data["image/png"] for data in shown if "image/png" in data]


def words_for_pictures(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what each picture has for whoever cannot see it; nothing where it has nothing."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    return [output.metadata.get("image/png", {}).get("alt", "") for output in shown]


def assert_same_prints(old: nbformat.NotebookNode, new: nbformat.NotebookNode) -> None:
    """Check that a run prints what is committed, but for cells that vary."""
    for before, after in zip(code_cells(old), code_cells(new), strict=True):
        if VARIES not in before.metadata.get("tags", ()):
            assert printed(after) == printed(before), f"stale: refresh it\n{before.source}"
        assert bool(printed(after)) == bool(printed(before)), before.source
        assert len(pictures(after)) == len(pictures(before)), before.source


def assert_small_and_tidy(path: Path, most_bytes: int) -> None:
    """Check what is committed: outputs, words for every picture, and nothing of this machine."""
    committed = read(path)
    assert path.stat().st_size < most_bytes
    assert tidy(read(path)) == committed
    assert str(ROOT) not in path.read_text()
    assert all(cell.outputs for cell in code_cells(committed) if "print(" in cell.source)
    assert all(len(words) > 30 for words in words_for_pictures(committed))
    last = [cell.source for cell in committed.cells if cell.cell_type == "markdown"][-1]
    assert "## What next" in last
    assert "[notebooks]" in committed.cells[0].source


def refresh(path: Path) -> None:
    """Run a notebook and write it with its outputs."""
    nbformat.write(tidy(run(read(path))), path)
