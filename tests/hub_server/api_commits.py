"""Writing: which files go to large storage (preupload), and commits, also as pull requests."""

import base64
import binascii
import json
from collections.abc import Iterable

from .attributes import lfs_patterns, matches
from .card import problems
from .discussion import Discussion
from .hub import Hub, require_writer
from .messages import (
    HubError,
    Request,
    Response,
    as_json,
    entry_not_found,
    revision_not_found,
    routes,
)
from .repository import Commit, Entry, Repository

MAX_REGULAR_SIZE = 10 * 2**20


@routes.add("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(hub: Hub, request: Request, repo: str, rev: str) -> Response:
    repository = _writable(hub, request, repo, rev)
    commit = repository.resolve(rev)
    attributes = commit.files.get(".gitattributes")
    tracked = lfs_patterns(hub.content[attributes.key].decode()) if attributes else []
    form = request.json()
    ignored = [line.strip() for line in form.get("gitIgnore", "").splitlines()]
    files = []
    for file in form["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        binary = b"\0" in sample or file["size"] > MAX_REGULAR_SIZE
        answer = {
            "path": path,
            "uploadMode": "lfs" if binary or matches(path, tracked) else "regular",
            "shouldIgnore": matches(path, ignored),
        }
        if path in commit.files:
            # The client leaves out of its commit what it already finds here.
            answer["oid"] = commit.files[path].key
        files.append(answer)
    return as_json({"files": files, "commitOid": commit.id})


@routes.add("POST", "/api/models/{repo}/commit/{rev}")
def commit(hub: Hub, request: Request, repo: str, rev: str) -> Response:
    repository = _writable(hub, request, repo, rev)
    author = require_writer(request.token).user
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    except ValueError as error:
        raise HubError(400, f"Invalid commit: {error}") from error
    if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
        raise HubError(400, "Invalid commit: a header with a summary must come first")
    header = lines[0]["value"]

    reference = repository.reference(rev)
    if reference.startswith("refs/tags/"):
        raise revision_not_found(rev)
    base = repository.resolve(rev)
    parent = header.get("parentCommit")
    if parent is not None and not base.id.startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    changes = _read_changes(hub, base, lines[1:])

    title, description = header["summary"], header.get("description", "")
    number = None
    if request.flag("create_pr"):
        discussion = open_pull_request(repository, title, author, "open", base)
        discussion.comment(author, description)
        number, reference = discussion.num, discussion.reference
    elif reference.startswith("refs/pr/"):
        number = int(reference.rpartition("/")[2])
    made = repository.commit(reference, changes, title, description, author)
    if number is not None:
        pull_request = repository.discussions[number]
        pull_request.add_event("commit", author, subject=title, oid=made.id)

    answer = {
        "success": True,
        "commitOid": made.id,
        "commitUrl": f"{request.base_url}/{repo}/commit/{made.id}",
        "hookOutput": "",
    }
    if request.flag("create_pr"):
        answer["pullRequestUrl"] = f"{request.base_url}/{repo}/discussions/{number}"
    return as_json(answer)


def open_pull_request(
    repository: Repository, title: str, author: str, status: str, base: Commit
) -> Discussion:
    num = len(repository.discussions) + 1
    discussion = Discussion(num, title, author, True, status, base=base.id)
    repository.discussions[num] = discussion
    repository.refs[discussion.reference] = base.id
    return discussion


def _writable(hub: Hub, request: Request, repo: str, rev: str) -> Repository:
    """The repository, to put a commit on `rev`.

    Strangers may open pull requests, and go on with their own.
    """
    repository = hub.open(repo, request.token)
    number = rev.removeprefix("refs/pr/")
    discussion = repository.discussions.get(int(number)) if number.isdecimal() else None
    own = discussion is not None and request.token and discussion.author == request.token.user
    return hub.open_to_write(
        repo, request.token, pull_request=bool(own) or request.flag("create_pr")
    )


def _read_changes(hub: Hub, base: Commit, lines: Iterable[dict]) -> dict[str, Entry | None]:
    changes: dict[str, Entry | None] = {}
    for line in lines:
        kind, value = line["key"], line["value"]
        path = value["path"]
        if not path.strip("/") or ".." in path.split("/") or path.startswith("/"):
            raise HubError(400, f"Invalid path: {path!r}")
        match kind:
            case "file":
                changes[path] = _regular(hub, path, value)
            case "lfsFile":
                changes[path] = _large(hub, path, value)
            case "deletedFile" if path in base.files:
                changes[path] = None
            case "deletedFolder" if any(_inside(path, known) for known in base.files):
                changes |= {known: None for known in base.files if _inside(path, known)}
            case "deletedFile" | "deletedFolder":
                raise entry_not_found(f"A file with this name doesn't exist: {path}", base.id)
            case _:
                raise HubError(400, f"Invalid commit: unknown operation {kind!r}")
    return changes


def _regular(hub: Hub, path: str, value: dict) -> Entry:
    try:
        content = value["content"].encode()
        if value.get("encoding") == "base64":
            content = base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise HubError(400, f"Invalid content of {path}: {error}") from error
    if len(content) > MAX_REGULAR_SIZE:
        raise HubError(
            400, f"Your push was rejected because it contains files larger than 10 MiB: {path}"
        )
    if path == "README.md":
        errors, _ = problems(content.decode())
        if errors:
            raise HubError(400, "Invalid metadata in README.md.\n" + "\n".join(errors))
    return hub.store(content, large=False)


def _large(hub: Hub, path: str, value: dict) -> Entry:
    content = hub.content.get(value["oid"])
    if content is None or len(content) != value.get("size", len(content)):
        raise HubError(
            400,
            "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
            f"Offending file: {path}",
        )
    return Entry.large(value["oid"], len(content))


def _inside(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
