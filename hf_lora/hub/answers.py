"""What a server answers while the Hub's client works: for words, and before names become paths.

The client takes a server at its word. It names files of its cache after headers, and where an
answer has another shape than it expects it fails somewhere inside. So each response is looked at
before the client has it, in the client's own event hooks, and only where hf_lora has asked.
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.utils import _http

from hf_lora.errors import HubError
from hf_lora.text import show

_PATH_HEADERS = ("X-Repo-Commit", "X-Linked-Etag", "ETag")
"""Headers that the client names files and folders of its cache after."""

_PATH_PART = re.compile(r"(?!\.\.?$)[^/\\\0]{1,200}")
_TOKEN_LIKE = re.compile(r"(?<=\bBearer )\S+|\b(hf|api_org)_[A-Za-z0-9]{20,}")
_HIDDEN = "(token)"


@dataclasses.dataclass
class Answers:
    """What the server has answered in a block, and what it was told in confidence."""

    last: httpx2.Response | None = None
    secrets: set[str] = dataclasses.field(default_factory=set)

    def without_secrets(self, text: str) -> str:
        """Return ``text`` without the tokens that went to the server, should it repeat them."""
        for secret in self.secrets:
            text = text.replace(secret, _HIDDEN)
        return _TOKEN_LIKE.sub(_HIDDEN, text)

    def words(self) -> str:
        """Return the last call and what came back, in a line."""
        if self.last is None:
            return "nothing was answered"
        try:
            text = self.last.text
        except httpx2.StreamError:  # nobody has read it
            text = ""
        request = self.last.request
        said = f"{request.method} {request.url.path} gave HTTP {self.last.status_code}"
        return f"{said} and {show(' '.join(text.split()))}" if text else said


_WATCHING: contextvars.ContextVar[Answers | None] = contextvars.ContextVar(
    "hf_lora_hub_answers", default=None
)


@contextlib.contextmanager
def watched() -> Iterator[Answers]:
    """See what the server answers to this thread in the block.

    Raises:
        HubError: Out of the client's call, where a header would lead out of the cache.
    """
    _look_at_responses()
    answers = Answers()
    before = _WATCHING.set(answers)
    try:
        yield answers
    finally:
        _WATCHING.reset(before)


def _see(response: httpx2.Response) -> None:
    answers = _WATCHING.get()
    if answers is None:
        return
    answers.last = response
    _, _, token = response.request.headers.get("authorization", "").partition(" ")
    if len(token) > 3:  # shorter ones would be found in any text
        answers.secrets.add(token)
    for name in _PATH_HEADERS:
        value = response.headers.get(name)
        if value is not None and not _PATH_PART.fullmatch(value.lstrip("W/").strip('"')):
            raise HubError(
                f"The server at {constants.ENDPOINT} does not answer as a Hub: its header {name} "
                f"is {show(value)}, which would lead out of the cache. Nothing was written."
            )


def _look_at_responses() -> None:
    """Have the client's session call :func:`_see`, and each one that it makes after an error.

    ``_GLOBAL_CLIENT_FACTORY`` is private (huggingface_hub 2.4). The public ``set_client_factory``
    closes the session, which other threads may be using. Without this a broken connection, which a
    server can bring about, would leave the next session unwatched.
    """
    factory = _http._GLOBAL_CLIENT_FACTORY
    if not isinstance(factory, _Watching):
        _http._GLOBAL_CLIENT_FACTORY = _Watching(factory)
    _watch(get_session())


@dataclasses.dataclass(frozen=True)
class _Watching:
    """The client's factory of sessions, or the user's, whose sessions are looked at."""

    make: Callable[[], httpx2.Client]

    def __call__(self) -> httpx2.Client:
        return _watch(self.make())


def _watch(session: httpx2.Client) -> httpx2.Client:
    hooks = session.event_hooks["response"]
    if _see not in hooks:
        hooks.append(_see)
    return session
