"""The Hub's state without any socket: repositories, content, tokens, and who may touch what."""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

from .accounts import OTHER, READ, WRITE, Token
from .attributes import GITATTRIBUTES
from .messages import HubError, Request
from .repository import Entry, Repository, git_oid

Content = bytes | str | Path


class Hub:
    def __init__(self, *, lfs_part_size: int | None = None, page_size: int = 1000):
        self.lfs_part_size = lfs_part_size
        """Files above this many bytes are sent in parts; None never asks for parts."""
        self.page_size = page_size
        self.repositories: dict[str, Repository] = {}
        self.tokens = {token.value: token for token in (WRITE, READ, OTHER)}
        self.content: dict[str, bytes] = {}
        """Git blob id or, for large files, sha256 to bytes."""
        self.parts: dict[str, dict[int, bytes]] = {}
        """sha256 of a large file on its way to the parts that have arrived."""
        self._secret = secrets.token_bytes(16)

    def authenticate(self, header: str | None) -> Token | None:
        if not header:
            return None
        token = self.tokens.get(header.removeprefix("Bearer "))
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return token

    def sign(self, path: str) -> str:
        """A signature that lets whoever holds the URL read or write this path of the storage."""
        return hmac.new(self._secret, path.encode(), hashlib.sha256).hexdigest()[:16]

    def check_signature(self, request: Request) -> None:
        given = request.query.get("signature", [""])[0]
        if not hmac.compare_digest(given, self.sign(request.path)):
            raise HubError(403, "SignatureDoesNotMatch")

    def create(
        self, repo_id: str, *, private: bool = False, gated: bool = False, author: str = "user"
    ) -> Repository:
        """A new repository. Its first commit holds `.gitattributes`, as on the Hub."""
        repository = Repository(repo_id, private, gated)
        self.repositories[repo_id] = repository
        first = {".gitattributes": self.store(GITATTRIBUTES, large=False)}
        repository.commit("refs/heads/main", first, "initial commit", author=author)
        return repository

    def store(self, content: Content, *, large: bool) -> Entry:
        if isinstance(content, Path):
            content = content.read_bytes()
        elif isinstance(content, str):
            content = content.encode()
        if large:
            entry = Entry.large(hashlib.sha256(content).hexdigest(), len(content))
        else:
            entry = Entry(git_oid(content), len(content))
        self.content[entry.key] = content
        return entry

    def files(self, repository: Repository, revision: str = "main") -> Mapping[str, bytes]:
        commit = repository.resolve(revision)
        return {path: self.content[entry.key] for path, entry in commit.files.items()}

    def open(self, repo_id: str, token: Token | None) -> Repository:
        """The repository, if this token may see it. A private one looks as if it did not exist."""
        repository = self.repositories.get(repo_id)
        hidden = repository is None or repository.private
        if hidden and token is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repository is None or (repository.private and not (token and token.owns(repo_id))):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def open_content(self, repo_id: str, token: Token | None) -> Repository:
        """As `open`, and a gated repository shows its files only to its owner."""
        repository = self.open(repo_id, token)
        if repository.gated and token is None:
            raise HubError(
                401,
                f"Access to model {repo_id} is restricted. You must have access to it and be "
                "authenticated to access it. Please log in.",
                "GatedRepo",
            )
        if repository.gated and not (token and token.owns(repo_id)):
            raise HubError(
                403,
                f"Access to model {repo_id} is restricted and you are not in the authorized list.",
                "GatedRepo",
            )
        return repository

    def open_to_write(
        self, repo_id: str, token: Token | None, *, pull_request: bool = False
    ) -> Repository:
        """As `open`, for a change: write role, and ownership unless it is a pull request."""
        repository = self.open(repo_id, token)
        if token is None:
            # Over https the client takes any 401 on a repository for "not found"; over http it
            # needs the code to say the same.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        writer = require_writer(token)
        if not (pull_request or writer.owns(repo_id)):
            raise HubError(
                403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            )
        return repository


def require_writer(token: Token | None) -> Token:
    if token is None:
        raise HubError(401, "Invalid username or password.")
    if token.role != "write":
        raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
    return token
