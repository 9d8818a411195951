"""The tutorial notebook runs from top to bottom, and shows what it says it shows.

After a change, `python -m tests.examples.test_tutorial` runs it and writes the outputs again.
"""

import base64
import io
import json

import matplotlib.image
import nbformat
import pytest

from tests.examples.notebooks import (
    FOLDER,
    assert_same_prints,
    assert_small_and_tidy,
    code_cells,
    pictures,
    printed,
    read,
    refresh,
    run,
    tidy,
)

NOTEBOOK = FOLDER / "tutorial.ipynb"
MOST_BYTES = 300_000

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


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return read(NOTEBOOK)


@pytest.fixture(scope="module")
def executed() -> tuple[nbformat.NotebookNode, dict]:
    """Run the notebook once; return it with fresh outputs, and what its variables came to."""
    notebook = read(NOTEBOOK)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    tidy(run(notebook))
    return notebook, json.loads(printed(notebook.cells.pop()))


def test_it_prints_what_is_committed(committed, executed) -> None:
    fresh, _ = executed
    assert_same_prints(committed, fresh)


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


def test_what_is_committed_is_small_and_tidy() -> None:
    assert_small_and_tidy(NOTEBOOK, MOST_BYTES)


if __name__ == "__main__":
    refresh(NOTEBOOK)
