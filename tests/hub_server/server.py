"""`HubServer`: a Hub on loopback that a test starts, seeds, breaks and reads."""

import threading
import traceback
from collections.abc import Mapping
from pathlib import Path

# The modules of routes register themselves.
from . import api_commits, api_discussions, api_files, api_repos  # noqa: F401
from .accounts import Token
from .attributes import GITATTRIBUTES, lfs_patterns, matches
from .connection import Listener
from .faults import Action, Answer, Fault, RequestLog
from .hub import Content, Hub
from .messages import HubError, Request, Response, routes
from .repository import Commit, Repository


class HubServer:
    """A Hub for models on a free loopback port, in a thread of this process.

    ```python
    with HubServer() as server:
        server.add_repo("user/base", folder=base_folder)
        server.fail("PUT", "/lfs/", Die(after_bytes=1000, back_after=0.5))
        run_python("...", hub_environment(server, tmp_path))
        assert len(server.log.commits) == 1
    ```

    Leaving the block raises if a fault never struck, if a client asked for something that this
    server does not speak, or if the server itself failed: a test would prove less than it says.
    """

    def __init__(self, *, lfs_part_size: int | None = None, page_size: int = 1000):
        self.hub = Hub(lfs_part_size=lfs_part_size, page_size=page_size)
        self.log = RequestLog()
        self.problems: list[str] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._switch = threading.RLock()
        self._listener = Listener(self)
        self._comeback: threading.Timer | None = None

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
        if kind is None:
            self.check()

    @property
    def url(self) -> str:
        host, port = self._listener.server_address[:2]
        return f"http://{host}:{port}"

    # Up and down

    def start(self) -> None:
        """Listen, on the port this server has had from its beginning."""
        with self._switch:
            if not self._listener.running:
                self._listener.start()

    def stop(self) -> None:
        """Break all connections and refuse new ones. State, port and log stay."""
        with self._switch:
            port = self._listener.port
            self._listener.stop()
            self._listener = Listener(self, port)

    def die(self, back_after: float | None = None) -> None:
        """As `stop`, and come back by itself after some seconds."""
        self.stop()
        if back_after is not None:
            self._comeback = threading.Timer(back_after, self.start)
            self._comeback.daemon = True
            self._comeback.start()

    def close(self) -> None:
        if self._comeback is not None:
            self._comeback.cancel()
            self._comeback.join()
        with self._switch:
            self._listener.stop()

    def check(self) -> None:
        """Raise for everything that a passing test should not have left behind."""
        idle = [
            f"this fault struck {fault.hits} of {fault.times} times: {fault}"
            for fault in self._faults
            if fault.hits < fault.times
        ]
        found = "\n".join(idle + self.problems)
        assert not found, f"{found}\nThe requests were:\n{self.log}"

    # Faults

    def fail(
        self, method: str, pattern: str, action: Action | int, *, times: int = 1, skip: int = 0
    ) -> Fault:
        """Let the next `times` requests of `method` on paths that contain a regex go wrong.

        `action` says how (an integer is short for `Answer(status)`); `skip` lets so many pass
        first. The oldest fault that matches a request is the one that strikes.
        """
        action = Answer(action) if isinstance(action, int) else action
        fault = Fault(method, pattern, action, times, skip)
        with self._lock:
            self._faults.append(fault)
        return fault

    def take_fault(self, method: str, path: str) -> Action | None:
        with self._lock:
            for fault in self._faults:
                if fault.take(method, path):
                    return fault.action
        return None

    def forget(self) -> None:
        """Drop log, faults and problems, and listen: as new to the next test, but for the state."""
        with self._lock:
            self._faults.clear()
            self.problems.clear()
            self.log.clear()
        self.start()

    # Requests

    def answer(self, request: Request) -> Response:
        found = routes.find(request.method, request.path)
        if found is None:
            self.problems.append(f"no such route: {request.method} {request.path}")
            raise HubError(404, "Sorry, we can't find the page you are looking for.")
        function, values = found
        with self._lock:
            try:
                return function(self.hub, request, **values)
            except HubError:
                raise
            except Exception as error:
                self.problems.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
                raise HubError(500, f"Internal error: {error!r}") from error

    # Seeding and reading, without HTTP

    def add_token(self, token: Token) -> None:
        self.hub.tokens[token.value] = token

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, Content] | None = None,
        *,
        folder: Path | None = None,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Place a model and return the commit's id.

        It gets `files` (path to bytes, text or a file to read) and all that lies in `folder`.
        """
        with self._lock:
            if repo_id in self.hub.repositories:
                raise ValueError(f"{repo_id!r} is on this server already; use add_commit")
            namespace = repo_id.partition("/")[0]
            self.hub.create(repo_id, private=private, gated=gated, author=namespace)
            return self.add_commit(repo_id, _in_folder(folder) | dict(files or {}), title="Seed").id

    def add_commit(
        self,
        repo_id: str,
        files: Mapping[str, Content | None],
        *,
        revision: str = "main",
        title: str = "Change",
    ) -> Commit:
        """A commit on a branch, which is made from main if it is new. None removes a file."""
        with self._lock:
            repository = self.repository(repo_id)
            reference = f"refs/heads/{revision}"
            if reference not in repository.refs:
                repository.add_reference(reference, repository.resolve("main").id)
            tracked = lfs_patterns(GITATTRIBUTES)
            changes = {
                path: None
                if content is None
                else self.hub.store(content, large=matches(path, tracked))
                for path, content in files.items()
            }
            return repository.commit(reference, changes, title)

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            known = ", ".join(self.hub.repositories) or "none"
            raise KeyError(f"no repository {repo_id!r} on this server; it has {known}")
        return self.hub.repositories[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> Mapping[str, bytes]:
        """Path to content, at a revision."""
        with self._lock:
            return self.hub.files(self.repository(repo_id), revision)

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits, newest first; the last is the one that a new repository starts with."""
        with self._lock:
            return self.repository(repo_id).history(revision)


def _in_folder(folder: Path | None) -> dict[str, Content]:
    if folder is None:
        return {}
    found = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    if not found:
        raise ValueError(f"no files in {folder}")
    return dict(found)
