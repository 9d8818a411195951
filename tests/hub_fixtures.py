"""One Hub and one process with the real client, for all tests that push or pull."""

from collections.abc import Iterator

import pytest

from tests.hub.hub_worker import Worker, seed_base, working
from tests.hub_server import HubServer


@pytest.fixture(scope="session")
def hub_of_the_session() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_of_the_session: HubServer) -> Iterator[HubServer]:
    """The Hub, with an empty log and no faults. Each test uses repositories of its own."""
    hub_of_the_session.forget()
    yield hub_of_the_session
    try:
        hub_of_the_session.check()
    finally:
        hub_of_the_session.forget()


@pytest.fixture(scope="session")
def worker(
    hub_of_the_session: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A process logged in as `user`, on whose Hub `user/base` is a tiny Llama."""
    with working(hub_of_the_session, tmp_path_factory.mktemp("client")) as worker:
        seed_base(hub_of_the_session, worker)
        yield worker
