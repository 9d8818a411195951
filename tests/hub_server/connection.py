"""The sockets: a threaded HTTP/1.1 listener and what it does with one connection."""

import contextlib
import socket
import socketserver
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from .accounts import Token
from .faults import Action, Answer, CutDownload, Die, Exchange, LoseAnswer
from .messages import HubError, Request, Response

if TYPE_CHECKING:
    from .server import HubServer

HOST = "127.0.0.1"
STORAGE_HOST = "localhost"  # the same interface, another origin

_PIECE = 2**16


class Broken(ConnectionError):
    """This connection ends here, without an answer."""


class Listener(socketserver.ThreadingTCPServer):
    """Bound from the start, so that nobody else gets the port; accepts connections once started."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: "HubServer", port: int = 0):
        super().__init__((HOST, port), Connection, bind_and_activate=False)
        self.owner = owner
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.server_bind()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        self.server_activate()
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Accept nothing more and break what is open."""
        if self._thread is not None:
            self.shutdown()
            self._thread = None
        self.server_close()
        with self._lock:
            for connection in self._connections:
                _break(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # A client that goes away, or a connection that we broke, is nothing to report.
        if not isinstance(error, OSError):
            self.owner.problems.append("".join(traceback.format_exception(error)))


class Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one packet, or every answer waits for an ACK
    disable_nagle_algorithm = True
    server: Listener  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """The server's log is `HubServer.log`."""

    def _exchange(self) -> None:
        owner, url = self.server.owner, urlsplit(self.path)
        action = owner.take_fault(self.command, url.path)
        body = self._body(action.after_bytes if isinstance(action, Die) else None)
        if isinstance(action, Die):
            self._record(None, None)
            owner.die(action.back_after)
            raise Broken
        token: Token | None = None
        try:
            token = owner.hub.authenticate(self.headers.get("Authorization"))
            response = self._respond(action, url.path, url.query, body, token)
        except HubError as error:
            response = error.response()
        if isinstance(action, LoseAnswer):
            self._record(None, token)
            _break(self.connection)
            raise Broken
        self._record(response.status, token)
        self._send(response, action.after_bytes if isinstance(action, CutDownload) else None)

    do_DELETE = do_GET = do_HEAD = do_PATCH = do_POST = do_PUT = _exchange

    def _respond(
        self, action: Action | None, path: str, query: str, body: bytes, token: Token | None
    ) -> Response:
        if isinstance(action, Answer):
            raise HubError(action.status, action.message, headers=action.headers)
        owner = self.server.owner
        request = Request(
            method=self.command,
            path=path,
            query=parse_qs(query, keep_blank_values=True),
            headers={name.lower(): text for name, text in self.headers.items()},
            body=body,
            token=token,
            base_url=owner.url,
            storage_url=owner.url.replace(HOST, STORAGE_HOST),
        )
        return owner.answer(request)

    def _body(self, limit: int | None) -> bytes:
        """The request's body; no more than the first `limit` bytes of it, if there is a limit."""
        body = bytearray()
        for piece in self._pieces():
            body += piece
            if limit is not None and len(body) >= limit:
                break
        return bytes(body)

    def _pieces(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self._line().split(b";")[0], 16):
                yield from self._exactly(size)
                self._line()
            while self._line().strip():  # trailers
                pass
        else:
            yield from self._exactly(int(self.headers.get("Content-Length", "0")))

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read1(min(size, _PIECE))
            if not piece:
                raise Broken
            size -= len(piece)
            yield piece

    def _line(self) -> bytes:
        line = self.rfile.readline(_PIECE)
        if not line:
            raise Broken
        return line

    def _send(self, response: Response, cut_after: int | None) -> None:
        self.send_response(response.status)
        for name, text in response.headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(response.body[:cut_after])
        if cut_after is not None:
            self.wfile.flush()
            _break(self.connection)
            raise Broken

    def _record(self, status: int | None, token: Token | None) -> None:
        path, _, query = self.path.partition("?")
        user = token.user if token else None
        headers = {name.lower(): text for name, text in self.headers.items()}
        headers.pop("authorization", None)
        self.server.owner.log.add(Exchange(self.command, path, query, user, status, headers))


def _break(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client may have been faster
        connection.shutdown(socket.SHUT_RDWR)
