"""The notebooks with real models run, learn what they say, and are committed as they print.

After a change, `python -m tests.examples.test_notebooks NAME` runs one and writes its outputs
again. The models come from the package index (`examples/assets.py`), once per cache.
"""

import json
import sys
from typing import Any

import nbformat
import pytest

from tests.examples.notebooks import (
    FOLDER,
    assert_same_prints,
    assert_small_and_tidy,
    printed,
    read,
    refresh,
    run,
    tidy,
    words_for_pictures,
)

PROBES = {
    "chat_adapter": """
print(json.dumps({"before": before, "after": after, "losses": learned, "held_out": held_out}))
""",
    "classifier": """
import json
print(json.dumps({name: share for name, (_, share, _) in runs.items()}))
""",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def execute(name: str) -> tuple[nbformat.NotebookNode, Any]:
    """Run a notebook; return it with fresh outputs, and what its variables came to."""
    notebook = read(FOLDER / f"{name}.ipynb")
    notebook.cells.append(nbformat.v4.new_code_cell(PROBES[name]))
    tidy(run(notebook))
    return notebook, json.loads(printed(notebook.cells.pop()))


def test_the_chat_adapter_learns_to_answer_in_one_sentence():
    fresh, values = execute("chat_adapter")
    assert_same_prints(read(FOLDER / "chat_adapter.ipynb"), fresh)
    assert len(words_for_pictures(fresh)) == 1
    losses = [loss for _, loss in values["losses"]]
    assert losses[-1] < 0.8 * losses[0]
    held_out = [loss for _, loss in values["held_out"]]
    assert held_out[-1] < held_out[0]
    for question, answer in values["after"].items():
        assert answer != values["before"][question]
        assert answer.count(".") <= 1


def test_the_classifier_learns_more_with_an_adapter_than_with_a_head_alone():
    fresh, right = execute("classifier")
    assert_same_prints(read(FOLDER / "classifier.ipynb"), fresh)
    assert len(words_for_pictures(fresh)) == 1
    assert min(right["attention"], right["all"]) > max(0.8, right["head"] + 0.1)


@pytest.mark.parametrize("name", PROBES)
def test_what_is_committed_is_small_and_tidy(name: str):
    assert_small_and_tidy(FOLDER / f"{name}.ipynb", 120_000)


if __name__ == "__main__":
    refresh(FOLDER / f"{sys.argv[1]}.ipynb")
