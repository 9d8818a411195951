"""Content: downloads, the storage behind them, and uploads of large files by git-lfs's protocol."""

import hashlib
import math
import re

from .hub import Hub, require_writer
from .messages import HubError, Request, Response, as_json, routes

_LFS_TYPE = "application/vnd.git-lfs+json"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@routes.add("HEAD GET", "/{repo}/resolve/{rev}/{path}")
def resolve(hub: Hub, request: Request, repo: str, rev: str, path: str) -> Response:
    commit = hub.open_content(repo, request.token).resolve(rev)
    entry = commit.entry(path)
    name = path.rpartition("/")[2]
    headers = {
        "X-Repo-Commit": commit.id,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'inline; filename="{name}"',
        "ETag": f'"{entry.oid}"',
    }
    if entry.sha256 is None:
        return _ranged(request, hub.content[entry.oid], headers)
    headers |= {
        "X-Linked-Etag": f'"{entry.sha256}"',
        "X-Linked-Size": str(entry.size),
        "Location": _signed(hub, request.storage_url, f"/storage/{entry.sha256}"),
        "Content-Type": "text/plain; charset=utf-8",
    }
    return Response(302, b"Found. Redirecting to the storage", headers)


@routes.add("HEAD GET", "/storage/{oid}")
def storage(hub: Hub, request: Request, oid: str) -> Response:
    hub.check_signature(request)
    return _ranged(request, hub.content[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


@routes.add("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, repo: str) -> Response:
    hub.open(repo, request.token)
    require_writer(request.token)
    form = request.json()
    if form.get("operation") != "upload" or form.get("hash_algo", "sha256") != "sha256":
        raise HubError(400, "This server takes uploads with sha256 only")
    multipart = hub.lfs_part_size is not None and "multipart" in form.get("transfers", [])
    objects = []
    for wanted in form["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
        if not re.fullmatch(r"[0-9a-f]{64}", wanted["oid"]):
            answer["error"] = {"code": 422, "message": "Invalid oid"}
        elif wanted["oid"] not in hub.content:  # without actions: the content is here
            verify = f"{request.base_url}/{repo}.git/info/lfs/objects/verify"
            upload = _upload_action(hub, request, wanted["oid"], wanted["size"], multipart)
            answer["actions"] = {"upload": upload, "verify": {"href": verify}}
        objects.append(answer)
    transfer = "multipart" if multipart else "basic"
    return as_json({"transfer": transfer, "objects": objects}, Content_Type=_LFS_TYPE)


def _upload_action(hub: Hub, request: Request, oid: str, size: int, multipart: bool) -> dict:
    if not multipart or hub.lfs_part_size is None or size <= hub.lfs_part_size:
        return {"href": _signed(hub, request.storage_url, f"/lfs/{oid}"), "header": {}}
    header = {"chunk_size": str(hub.lfs_part_size)}
    for number in range(1, math.ceil(size / hub.lfs_part_size) + 1):
        header[str(number)] = _signed(hub, request.storage_url, f"/lfs/{oid}/part/{number}")
    hub.parts.setdefault(oid, {})
    return {"href": _signed(hub, request.base_url, f"/lfs/{oid}/complete"), "header": header}


@routes.add("PUT", "/lfs/{oid}")
def lfs_upload(hub: Hub, request: Request, oid: str) -> Response:
    hub.check_signature(request)
    _keep(hub, oid, request.body)
    return Response(headers={"ETag": f'"{oid}"'})


@routes.add("PUT", "/lfs/{oid}/part/{num}")
def lfs_upload_part(hub: Hub, request: Request, oid: str, num: str) -> Response:
    hub.check_signature(request)
    hub.parts.setdefault(oid, {})[int(num)] = request.body
    return Response(headers={"ETag": _part_etag(request.body)})


@routes.add("POST", "/lfs/{oid}/complete")
def lfs_complete(hub: Hub, request: Request, oid: str) -> Response:
    hub.check_signature(request)
    parts = hub.parts.get(oid, {})
    named = [(part["partNumber"], part["etag"]) for part in request.json()["parts"]]
    known = [(number, _part_etag(part)) for number, part in sorted(parts.items())]
    if named != known:
        raise HubError(400, f"InvalidPart: {named} were named, {known} have arrived")
    _keep(hub, oid, b"".join(part for _, part in sorted(parts.items())))
    del hub.parts[oid]
    return as_json({"success": True})


@routes.add("POST", "/{repo}.git/info/lfs/objects/verify")
def lfs_verify(hub: Hub, request: Request, repo: str) -> Response:
    hub.open(repo, request.token)
    require_writer(request.token)
    form = request.json()
    if len(hub.content.get(form["oid"], b"")) != form["size"]:
        raise HubError(422, f"Object {form['oid']} is not here in full")
    return as_json({})


def _keep(hub: Hub, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        raise HubError(400, f"BadDigest: the content of {oid} has another sha256")
    hub.content[oid] = content


def _part_etag(part: bytes) -> str:
    return f'"{hashlib.md5(part).hexdigest()}"'


def _signed(hub: Hub, origin: str, path: str) -> str:
    return f"{origin}{path}?signature={hub.sign(path)}"


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The content, or the one range of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream"} | headers
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or match.groups() == ("", ""):
        return Response(200, content, headers)
    first, last = match.groups()
    size = len(content)
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if start >= end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(206, content[start:end], headers)
