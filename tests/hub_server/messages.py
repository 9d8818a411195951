"""What goes over the wire: request, response, an error in the Hub's shape, and the routes."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from .accounts import Token


@dataclass(frozen=True)
class Request:
    """A request whose body has arrived in full and whose token, if it has one, is known."""

    method: str
    path: str
    """As sent, still percent-encoded: a revision such as `refs/pr/1` is one segment of it."""
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    token: Token | None
    base_url: str
    """The Hub's own address."""
    storage_url: str
    """Another origin, for large files: the client follows a redirect within one, blindly."""

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON body: {error}") from error

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Response:
    headers = {name.replace("_", "-"): text for name, text in headers.items()}
    headers.setdefault("Content-Type", "application/json; charset=utf-8")
    return Response(status, json.dumps(value).encode(), headers)


class HubError(Exception):
    """An answer with an error status, in the Hub's shape: JSON body and `X-Error-*` headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})
        self.body = body

    def response(self) -> Response:
        # Header values travel as latin-1; a name from a request can hold anything.
        text = self.message.encode("ascii", "replace").decode().replace("\n", " ")
        headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": text}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        body = json.dumps({"error": self.message} | self.body).encode()
        return Response(self.status, body, headers | self.headers)


def entry_not_found(message: str, commit: str) -> HubError:
    # Without X-Repo-Commit the client cannot remember that the file is absent at this commit.
    return HubError(404, message, "EntryNotFound", {"X-Repo-Commit": commit})


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


_PLACEHOLDERS = {
    "repo": r"[^/]+(?:/[^/]+)?",  # "gpt2" is a legal name on the Hub, too
    "rev": r"[^/]+",
    "name": r"[^/]+",
    "oid": r"[0-9a-f]{64}",
    "num": r"\d+",
    "path": r".+",
}


class Routes:
    """(method, path pattern) to function. Patterns are tried in the order of their addition."""

    def __init__(self) -> None:
        self._table: list[tuple[str, re.Pattern[str], Callable[..., Response]]] = []

    def add(self, methods: str, pattern: str) -> Callable[[Callable], Callable]:
        regex = re.sub(
            r"\{(\w+)\}",
            lambda match: f"(?P<{match[1]}>{_PLACEHOLDERS[match[1]]})",
            re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}"),
        )

        def register(function: Callable[..., Response]) -> Callable[..., Response]:
            for method in methods.split():
                self._table.append((method, re.compile(regex), function))
            return function

        return register

    def find(self, method: str, path: str) -> tuple[Callable[..., Response], dict[str, str]] | None:
        for known, regex, function in self._table:
            match = regex.fullmatch(path) if known == method else None
            if match is not None:
                return function, {name: unquote(text) for name, text in match.groupdict().items()}
        return None


routes = Routes()
