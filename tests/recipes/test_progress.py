"""What is shown while something takes long."""

import pytest
from rich.console import Console

from hf_lora.recipes.progress import bars


def test_in_a_notebook_progress_is_plain_lines(monkeypatch: pytest.MonkeyPatch):
    """rich's own way there needs ipywidgets, and recurses without them until the stack is full."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert Console().is_jupyter
    assert not bars().console.is_jupyter
    assert bars().disable
