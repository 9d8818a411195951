"""The tutorial notebook runs from top to bottom, and shows what it says it shows.

It is committed with its outputs, so that it can be read where nothing runs, but without execution
counts and messages on stderr. After a change, `python tests/examples/test_tutorial.py` runs it and
writes the outputs again.
"""

import base64
import io
import json
import os
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
MOST_BYTES = 300_000
# Cells that train: their numbers depend on the processor, so they are checked by their meaning.
VARIES = "varies"

# Every cell on one loaded core; the limit of an ordinary test is too short for that.
pytestmark = pytest.mark.timeout(1800)

PROBE = """
import json
print(json.dumps({
    "clean": accuracy(reader, *clean_test),
    "before": accuracy(reader, *shady_test),
    "after": scores,
    "trained": counts,
    "final_losses": {name: sum(losses[-20:]) / 20 for name, losses in curves.items()},
    "first_losses": {name: losses[0] for name, losses in curves.items()},
    "forwards": go_on(llama, "hgf"),
    "backwards": go_on(model, "hgf"),
    "reloaded": go_on(again, "hgf"),
}))
"""


def read() -> nbformat.NotebookNode:
    """Return the notebook as it is committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Execute every cell; raise at the first that fails."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    client = NotebookClient(
        notebook,
        timeout=1500,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
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
            if output.output_type == "stream" and outputs and outputs[-1].output_type == "stream":
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


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return read()


@pytest.fixture(scope="module")
def executed() -> tuple[nbformat.NotebookNode, dict]:
    """Run the notebook once; return it with fresh outputs, and what its variables came to."""
    notebook = read()
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    tidy(run(notebook))
    return notebook, json.loads(printed(notebook.cells.pop()))


def test_it_prints_what_is_committed(committed, executed) -> None:
    fresh, _ = executed
    for old, new in zip(code_cells(committed), code_cells(fresh), strict=True):
        if VARIES not in old.metadata.get("tags", ()):
            assert printed(new) == printed(old), f"stale; see the top of this file\n{old.source}"
        assert bool(printed(new)) == bool(printed(old)), old.source
        assert len(pictures(new)) == len(pictures(old)), old.source


def test_the_numbers_of_the_chapters(executed) -> None:
    fresh, _ = executed
    text = "\n".join(printed(cell) for cell in code_cells(fresh))
    for expected in (
        "1·0.1 + 2·0.2 + 3·0.3 + 0.7 = 2.1",
        "1·0.4 + 2·0.5 + 3·0.6 + 0.8 = 4.0",
        "PyTorch says [2.1, 4.0]",
        "6 weights +     2 biases =          8 numbers",
        "16,777,216 weights + 4,096 biases = 16,781,312 numbers",
        "A x         = [7.0, 6.0]",
        "B (A x)     = [7.0, 0.0, 12.0, 13.0]",
        "2 · B (A x) = [14.0, 0.0, 24.0, 26.0]",
        "W x         = [6.0, 12.0, 18.0, 24.0]",
        "with LoRA          [20.0, 12.0, 42.0, 50.0]",
        "65,536 = 8 · 4096 + 4096 · 8",
        "99.61%",
        "0.lora_A\n0.lora_B\n2.lora_A\n2.lora_B\n",
        "every number of the base is what it was: True",
        "unmerged answers are identical: True",
        "files: adapter_config.json, adapter_model.safetensors",
        "same answers: True",
    ):
        assert expected in text


def test_the_adapters_learn(executed) -> None:
    _, values = executed
    assert values["clean"] > 0.97
    assert values["before"] < 0.4
    assert values["after"]["r = 8"] > 0.9
    # what the text says of the ranks
    assert values["after"]["r = 8"] > values["after"]["all"] - 0.03
    assert values["after"]["r = 4"] > values["after"]["r = 2"] + 0.05
    assert 7 < values["trained"]["all"] / values["trained"]["r = 8"] < 9
    for name, loss in values["final_losses"].items():
        assert loss < values["first_losses"][name] / 5, name


def test_the_llama_learns_to_go_backwards_and_can_be_reloaded(executed) -> None:
    _, values = executed
    assert values["forwards"].endswith("|ghijklmnop")
    assert values["backwards"] == values["reloaded"] == "hgf|edcbazyxwv"


def test_the_three_directions_are_those_of_the_shadow(executed) -> None:
    fresh, _ = executed
    text = next(printed(cell) for cell in code_cells(fresh) if "linalg.svd" in cell.source)
    shares = [int(line.split(":")[1].split("%")[0]) for line in text.splitlines()]
    assert len(shares) == 3
    assert min(shares) > 85


def test_every_picture_shows_something(executed) -> None:
    fresh, _ = executed
    images = [image for cell in code_cells(fresh) for image in pictures(cell)]
    assert len(images) == 6
    for image in images:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(image)), format="png")
        assert min(pixels.shape[:2]) > 150
        assert pixels[..., :3].std() > 0.05


def test_what_is_committed_is_small_and_tidy(committed) -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert tidy(read()) == committed
    assert str(ROOT) not in NOTEBOOK.read_text()
    assert all(cell.outputs for cell in code_cells(committed) if "print(" in cell.source)


def refresh() -> None:
    """Run the notebook and write it with its outputs."""
    nbformat.write(tidy(run(read())), NOTEBOOK)


if __name__ == "__main__":
    refresh()
