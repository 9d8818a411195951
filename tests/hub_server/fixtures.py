"""The pytest fixture; a `conftest.py` takes it with `from hub_server.fixtures import hub`."""

from collections.abc import Iterator

import pytest

from .server import HubServer


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with nothing on it. Faults that never struck and unknown requests fail the test."""
    with HubServer() as server:
        yield server
