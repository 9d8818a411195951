"""Accounts and repositories: whoami, create and delete, info, tree, references, history."""

import re
from urllib.parse import parse_qs, quote

from .card import derived_tags, metadata, problems
from .discussion import timestamp
from .hub import Hub, require_writer
from .messages import HubError, Request, Response, as_json, revision_not_found, routes
from .repository import Repository

_NAME = re.compile(r"(?![.-])[\w.-]{1,96}(?<![.-])")


@routes.add("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Response:
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    return as_json(request.token.profile())


@routes.add("GET", "/api/agent-harnesses")
def agent_harnesses(hub: Hub, request: Request) -> Response:
    return as_json({"standardEnvVars": [], "harnesses": {}})


@routes.add("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Response:
    errors, warnings = problems(request.json()["content"])
    answer = {
        "errors": [{"message": text} for text in errors],
        "warnings": [{"message": text} for text in warnings],
    }
    return as_json(answer, 400 if errors else 200)


@routes.add("POST", "/api/repos/create")
def create_repo(hub: Hub, request: Request) -> Response:
    form = request.json()
    name, kind = form["name"], form.get("type") or "model"
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    namespace = form.get("organization") or request.token.user
    repo_id = f"{namespace}/{name}"
    if kind != "model":
        raise HubError(400, f"This server holds models only, not a {kind}")
    if request.token.role != "write" or not request.token.owns(repo_id):
        raise HubError(
            403, f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        )
    if not _NAME.fullmatch(name) or "--" in name or ".." in name:
        raise HubError(400, f"Invalid repo name: {name}")
    url = f"{request.base_url}/{repo_id}"
    if repo_id in hub.repositories:
        # `exist_ok` reads the url out of this very answer
        raise HubError(409, "You already created this model repo", url=url)
    private = form.get("visibility") == "private" or form.get("private") is True
    hub.create(repo_id, private=private, author=request.token.user)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


@routes.add("DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, request: Request) -> Response:
    form = request.json()
    writer = require_writer(request.token)
    repo_id = f"{form.get('organization') or writer.user}/{form['name']}"
    hub.open_to_write(repo_id, writer)
    del hub.repositories[repo_id]
    return Response()


@routes.add("PUT", "/api/models/{repo}/settings")
def settings(hub: Hub, request: Request, repo: str) -> Response:
    repository = hub.open_to_write(repo, request.token)
    form = request.json()
    if "visibility" in form:
        repository.private = form["visibility"] == "private"
    if "gated" in form:
        repository.gated = bool(form["gated"])
    return as_json({"private": repository.private, "gated": repository.gated})


@routes.add("GET", "/api/models/{repo}/auth-check")
@routes.add("GET", "/api/models/{repo}/auth-check/write")
def auth_check(hub: Hub, request: Request, repo: str) -> Response:
    if request.path.endswith("/write"):
        hub.open_to_write(repo, request.token)
    hub.open_content(repo, request.token)
    return as_json({})


@routes.add("GET", "/api/models/{repo}/tree/{rev}")
@routes.add("GET", "/api/models/{repo}/tree/{rev}/{path}")
def tree(hub: Hub, request: Request, repo: str, rev: str, path: str = "") -> Response:
    repository = hub.open(repo, request.token)
    return _page(hub, request, repository.listing(rev, path, request.flag("recursive")))


@routes.add("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(hub: Hub, request: Request, repo: str, rev: str) -> Response:
    if request.headers.get("content-type", "").startswith("application/json"):
        paths = request.json()["paths"]
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    listing = hub.open(repo, request.token).listing(rev, recursive=True)
    wanted = {path.strip("/") for path in paths}
    return as_json([entry for entry in listing if entry["path"] in wanted])


@routes.add("GET", "/api/models/{repo}/commits/{rev}")
def commits(hub: Hub, request: Request, repo: str, rev: str) -> Response:
    history = [
        {
            "id": commit.id,
            "title": commit.title,
            "message": commit.description,
            "authors": [{"user": commit.author}],
            "date": timestamp(commit.date),
        }
        for commit in hub.open(repo, request.token).history(rev)
    ]
    return _page(hub, request, history)


@routes.add("GET", "/api/models/{repo}/refs")
def refs(hub: Hub, request: Request, repo: str) -> Response:
    repository = hub.open(repo, request.token)

    def under(prefix: str, cut: str) -> list[dict]:
        return [
            {"name": ref.removeprefix(cut), "ref": ref, "targetCommit": sha}
            for ref, sha in repository.refs.items()
            if ref.startswith(prefix)
        ]

    answer = {
        "branches": under("refs/heads/", "refs/heads/"),
        "tags": under("refs/tags/", "refs/tags/"),
        "converts": [],
    }
    if request.flag("include_prs"):
        answer["pullRequests"] = under("refs/pr/", "")
    return as_json(answer)


@routes.add("POST", "/api/models/{repo}/branch/{name}")
def create_branch(hub: Hub, request: Request, repo: str, name: str) -> Response:
    repository = hub.open_to_write(repo, request.token)
    start = repository.resolve(request.json().get("startingPoint") or "main")
    repository.add_reference(f"refs/heads/{name}", start.id)
    return Response()


@routes.add("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(hub: Hub, request: Request, repo: str, rev: str) -> Response:
    repository = hub.open_to_write(repo, request.token)
    repository.add_reference(f"refs/tags/{request.json()['tag']}", repository.resolve(rev).id)
    return Response()


@routes.add("DELETE", "/api/models/{repo}/branch/{name}")
@routes.add("DELETE", "/api/models/{repo}/tag/{name}")
def delete_reference(hub: Hub, request: Request, repo: str, name: str) -> Response:
    repository = hub.open_to_write(repo, request.token)
    kind = "heads" if "/branch/" in request.path else "tags"
    if (kind, name) == ("heads", "main"):
        raise HubError(403, "Forbidden: the main branch cannot be deleted")
    if repository.refs.pop(f"refs/{kind}/{name}", None) is None:
        raise revision_not_found(name)
    return Response()


@routes.add("GET", "/api/models/{repo}/xet-{name}-token/{path}")
def xet_token(hub: Hub, request: Request, repo: str, name: str, path: str) -> Response:
    """This Hub stores nothing in Xet. A client with Xet switched on has no other way to upload."""
    raise HubError(404, "Xet is not available for this repository")


@routes.add("GET", "/api/models/{repo}/revision/{rev}")
@routes.add("GET", "/api/models/{repo}")
def model_info(hub: Hub, request: Request, repo: str, rev: str = "main") -> Response:
    repository = hub.open(repo, request.token)
    return as_json(_info(hub, repository, rev, with_blobs=request.flag("blobs")))


def _info(hub: Hub, repository: Repository, revision: str, *, with_blobs: bool) -> dict:
    commit = repository.resolve(revision)
    siblings = []
    for path, entry in commit.files.items():
        sibling: dict = {"rfilename": path}
        if with_blobs:
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256 is not None:
                lfs = entry.describe(path)["lfs"]
                sibling["lfs"] = {"sha256": lfs["oid"], **lfs}
        siblings.append(sibling)
    readme = commit.files.get("README.md")
    card = metadata(hub.content[readme.key].decode()) if readme else {}
    info = {
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.id.partition("/")[0],
        "sha": commit.id,
        "private": repository.private,
        "gated": "auto" if repository.gated else False,
        "disabled": False,
        "createdAt": timestamp(repository.created),
        "lastModified": timestamp(commit.date),
        "tags": derived_tags(card),
        "siblings": siblings,
        "downloads": 0,
        "likes": 0,
        "spaces": [],
    }
    if card:
        info["cardData"] = card
    return info | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}


def _page(hub: Hub, request: Request, items: list[dict]) -> Response:
    """One page of a list, and where the next one is."""
    start = int(request.query.get("cursor", ["0"])[0])
    end = start + hub.page_size
    if end >= len(items):
        return as_json(items[start:])
    kept = {name: texts[0] for name, texts in request.query.items()} | {"cursor": str(end)}
    query = "&".join(f"{name}={quote(text)}" for name, text in kept.items())
    link = f'<{request.base_url}{request.path}?{query}>; rel="next"'
    return as_json(items[start:end], Link=link)
