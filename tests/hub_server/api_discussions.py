"""Discussions and pull requests: open, list, read, comment, close, merge."""

from datetime import UTC, datetime

from .api_commits import open_pull_request
from .discussion import Discussion
from .hub import Hub, require_writer
from .messages import HubError, Request, Response, as_json, routes
from .repository import Repository

_PAGE = 10


@routes.add("GET", "/api/models/{repo}/discussions")
def list_discussions(hub: Hub, request: Request, repo: str) -> Response:
    repository = hub.open(repo, request.token)
    kind, status, author, page = (
        request.query.get(name, [default])[0]
        for name, default in (("type", "all"), ("status", "all"), ("author", ""), ("p", "0"))
    )
    found = [
        discussion
        for _, discussion in sorted(repository.discussions.items(), reverse=True)
        if (kind == "all" or (kind == "pull_request") == discussion.is_pull_request)
        and (status == "all" or (status == "open") == (discussion.status in ("open", "draft")))
        and author in ("", discussion.author)
    ]
    start = int(page) * _PAGE
    shown = [discussion.summary(repo) for discussion in found[start : start + _PAGE]]
    return as_json({"discussions": shown, "count": len(found), "start": start})


@routes.add("POST", "/api/models/{repo}/discussions")
def open_discussion(hub: Hub, request: Request, repo: str) -> Response:
    repository = hub.open_to_write(repo, request.token, pull_request=True)
    author = require_writer(request.token).user
    form = request.json()
    if form.get("pullRequest"):
        # It has no commit yet, so it starts as a draft.
        head = repository.resolve("main")
        discussion = open_pull_request(repository, form["title"], author, "draft", head)
    else:
        num = len(repository.discussions) + 1
        discussion = Discussion(num, form["title"], author, False, "open")
        repository.discussions[num] = discussion
    discussion.comment(author, form["description"])
    return as_json(discussion.details(repo))


@routes.add("GET", "/api/models/{repo}/discussions/{num}")
def read_discussion(hub: Hub, request: Request, repo: str, num: str) -> Response:
    return as_json(_find(hub.open(repo, request.token), num).details(repo))


@routes.add("POST", "/api/models/{repo}/discussions/{num}/comment")
def comment(hub: Hub, request: Request, repo: str, num: str) -> Response:
    repository = hub.open_to_write(repo, request.token, pull_request=True)
    author = require_writer(request.token).user
    event = _find(repository, num).comment(author, request.json()["comment"])
    return as_json({"newMessage": event})


@routes.add("POST", "/api/models/{repo}/discussions/{num}/status")
def change_status(hub: Hub, request: Request, repo: str, num: str) -> Response:
    repository = hub.open_to_write(repo, request.token)
    discussion = _find(repository, num)
    author = require_writer(request.token).user
    form = request.json()
    if discussion.status == "merged" or form["status"] not in ("open", "closed"):
        raise HubError(400, f"Cannot go from {discussion.status} to {form['status']}")
    if form.get("comment"):
        discussion.comment(author, form["comment"])
    discussion.status = form["status"]
    event = discussion.add_event("status-change", author, status=form["status"])
    return as_json({"newStatus": event})


@routes.add("POST", "/api/models/{repo}/discussions/{num}/merge")
def merge(hub: Hub, request: Request, repo: str, num: str) -> Response:
    """Put what the pull request changed on top of main, in one commit."""
    repository = hub.open_to_write(repo, request.token)
    discussion = _find(repository, num)
    author = require_writer(request.token).user
    if not discussion.is_pull_request or discussion.status != "open" or discussion.base is None:
        raise HubError(400, f"Cannot merge #{num}: it is {discussion.status}")
    base = repository.commits[discussion.base].files
    head = repository.resolve(discussion.reference).files
    main = repository.resolve("main").files
    changed = {path for path in base | head if base.get(path) != head.get(path)}
    conflicts = sorted(p for p in changed if main.get(p) not in (base.get(p), head.get(p)))
    if conflicts:
        raise HubError(409, f"Conflicting files: {', '.join(conflicts)}")
    changes = {path: head.get(path) for path in changed}
    made = repository.commit(
        "refs/heads/main", changes, f"{discussion.title} (#{num})", author=author
    )
    discussion.status = "merged"
    discussion.merge_commit = made.id
    event = discussion.add_event("status-change", author, status="merged")
    return as_json({"newStatus": event, "mergedAt": datetime.now(UTC).isoformat()})


def _find(repository: Repository, num: str) -> Discussion:
    if int(num) not in repository.discussions:
        raise HubError(404, f"Discussion {num} not found")
    return repository.discussions[int(num)]
