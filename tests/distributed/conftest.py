"""How long the tests of this folder may take, which wait for processes on a shared machine."""

from pathlib import Path

import pytest

from tests.distributed.launch import LIMIT

LAUNCHES = 2
"""As many as a test and its fixtures wait for, at the most."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the launcher's own limit come first, which ends the processes and shows their logs."""
    for item in items:
        ours = Path(__file__).parent in item.path.parents
        if ours and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LAUNCHES * (LIMIT + 30)))
