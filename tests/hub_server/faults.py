"""What a test can make the server do wrong, and the record of every request it received."""

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Answer:
    """Answer with this error status and do nothing."""

    status: int
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Die:
    """Stop in the middle of a request, as a killed process does.

    Every connection breaks, none is accepted. What is stored stays; what is on its way is lost.
    """

    after_bytes: int = 0
    """How much of the request's body arrives before that (all of it, if it is shorter)."""
    back_after: float | None = None
    """Seconds until it listens again, on the same port. None: when the test calls `start`."""


@dataclass(frozen=True)
class LoseAnswer:
    """Do what was asked, then break the connection instead of saying so."""


@dataclass(frozen=True)
class CutDownload:
    """Announce the whole body, send this much of it, and break the connection."""

    after_bytes: int


Action = Answer | Die | LoseAnswer | CutDownload


@dataclass
class Fault:
    """An action for the next `times` requests of `method` on paths that contain a regex."""

    method: str
    pattern: str
    action: Action
    times: int = 1
    skip: int = 0
    """So many matching requests pass first."""
    hits: int = 0

    def take(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.pattern, path) or self.hits >= self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True


@dataclass(frozen=True)
class Exchange:
    """A request that the server received, and what came of it."""

    method: str
    path: str
    """As sent: percent-encoded, without the query."""
    query: str
    user: str | None
    """Whose token it carried."""
    status: int | None
    """None: the connection broke before an answer."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def authenticated(self) -> bool:
        return self.user is not None


class RequestLog:
    """Every exchange in order. Each is written down before its answer leaves."""

    def __init__(self) -> None:
        self._exchanges: list[Exchange] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Exchange]:
        with self._lock:
            return iter(list(self._exchanges))

    def __len__(self) -> int:
        return len(self._exchanges)

    def __repr__(self) -> str:
        """A line each, which is what a failed assertion shows."""
        return "\n".join(f"{e.status} {e.method} {e.path} ({e.user})" for e in self) or "(nothing)"

    def add(self, exchange: Exchange) -> None:
        with self._lock:
            self._exchanges.append(exchange)

    def clear(self) -> None:
        with self._lock:
            self._exchanges.clear()

    def matching(self, method: str, pattern: str = "") -> list[Exchange]:
        """The exchanges of this method whose path contains the regex."""
        return [e for e in self if e.method == method and re.search(pattern, e.path)]

    @property
    def commits(self) -> list[Exchange]:
        """The commits that were accepted."""
        return [e for e in self.matching("POST", "/commit/") if e.status == 200]
