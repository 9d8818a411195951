"""The server against the real huggingface_hub: pushes, downloads, listings, large files."""

import base64
import hashlib
import json
import subprocess
from pathlib import Path

from . import READ, WRITE, HubServer
from .calls import fetch, run
from .repository import Entry, lfs_pointer, tree_oids


def test_a_push_is_one_commit_and_comes_back(hub: HubServer, tmp_path: Path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    content = {
        "config.json": b"{}",
        "empty.txt": b"",
        "sub/model.safetensors": bytes(range(256)) * 400,
        "weights.unknown": b"\0binary",
    }
    for path, text in content.items():
        (folder / path).write_bytes(text)
    hub.add_repo("user/m", {"old.txt": "old", "old.bin": b"old"})
    script = """
push = lambda **kw: api.upload_folder(repo_id="user/m", folder_path=folder, **kw)
first = push(commit_message="the push", commit_description="why", delete_patterns="old.*")
again = push()
pulled = Path(snapshot_download("user/m"))
report({
    "oid": first.oid,
    "unchanged": again.oid,
    "files": sorted(api.list_repo_files("user/m")),
    "pulled": {str(f.relative_to(pulled)): f.read_bytes().hex()
               for f in pulled.rglob("*") if f.is_file() and f.name != ".gitattributes"},
    "lfs": sorted(s.rfilename for s in api.model_info("user/m", files_metadata=True).siblings
                  if s.lfs),
    "commits": [[c.title, c.message, c.authors] for c in api.list_repo_commits("user/m")],
})
"""
    found = run(hub, tmp_path, script, folder=folder)
    assert {path: bytes.fromhex(text) for path, text in found["pulled"].items()} == content
    assert found["files"] == sorted([".gitattributes", *content])
    assert found["lfs"] == ["sub/model.safetensors", "weights.unknown"]
    assert found["commits"] == [
        ["the push", "why", ["user"]],
        ["Seed", "", ["user"]],
        ["initial commit", "", ["user"]],
    ]
    assert found["oid"] == found["unchanged"] == hub.history("user/m")[0].id
    stored = dict(hub.files("user/m"))
    del stored[".gitattributes"]
    assert stored == content
    assert len(hub.log.commits) == 1
    assert len(hub.log.matching("PUT", "/lfs/")) == 2
    # The token stays with the Hub: storage gets signed addresses.
    assert {e.user for e in hub.log.matching("GET", "/storage/")} == {None}
    assert {e.user for e in hub.log.matching("PUT", "/lfs/")} == {None}


def test_commit_operations(hub: HubServer, tmp_path: Path):
    hub.add_repo(
        "user/m", {"a.txt": "a", "w.bin": b"w" * 99, "d/x.txt": "x", "d/y.bin": b"y", "z": "z"}
    )
    script = """
parent = api.model_info("user/m").sha
commit = lambda *ops, **kw: api.create_commit(
    repo_id="user/m", operations=list(ops), commit_message="many at once", **kw)
add = lambda path, text: CommitOperationAdd(path, text.encode())
commit(
    add("new.txt", "new"),
    CommitOperationCopy("a.txt", "copy.txt"),
    CommitOperationCopy("w.bin", "copy.bin"),
    CommitOperationDelete("z"),
    CommitOperationDelete("d/"),
    parent_commit=parent,
)
report({
    "stale_parent": outcome(commit, add("b", "b"), parent_commit=parent),
    "absent_file": outcome(commit, CommitOperationDelete("nothing")),
    "absent_folder": outcome(commit, CommitOperationDelete("nothing/")),
    "deleted": str(api.delete_file("a.txt", "user/m").commit_message),
})
"""
    assert run(hub, tmp_path, script) == {
        "stale_parent": ["HfHubHTTPError", 412],
        "absent_file": ["RemoteEntryNotFoundError", 404],
        "absent_folder": ["RemoteEntryNotFoundError", 404],
        "deleted": "Delete a.txt with huggingface_hub",
    }
    files = dict(hub.files("user/m"))
    del files[".gitattributes"]
    assert files == {"new.txt": b"new", "copy.txt": b"a", "copy.bin": b"w" * 99, "w.bin": b"w" * 99}
    assert len(hub.log.commits) == 2


def test_ids_are_those_of_git(tmp_path: Path):
    """The ids that a client sees are the ones git computes for the same files."""
    files = {"b.txt": b"b", "a/c.txt": b"c", "a/b/d": b"", "a.b": b"sorts before a/", "é": b"e"}
    large = {"w.bin": bytes(1000)}
    with HubServer() as server:
        server.add_repo("user/m", {**files, **large})
        commit = server.history("user/m")[0]
    for path, entry in commit.files.items():
        content = lfs_pointer(entry.sha256, entry.size) if entry.sha256 else files.get(path)
        if content is None:
            continue
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("init", "-q")
    git("-c", "core.autocrlf=false", "add", "-A")
    entries: dict[str, Entry] = {p: e for p, e in commit.files.items() if p != ".gitattributes"}
    assert tree_oids(entries)[""] == git("write-tree")
    assert tree_oids(entries)["a/b"] == git("rev-parse", git("write-tree") + ":a/b")


def test_tree_and_paths_info_page_by_page(tmp_path: Path):
    files = {f"d/{i}.txt": str(i) for i in range(7)} | {"w.bin": b"w" * 50}
    script = """
tree = lambda *args, **kw: sorted(e.path for e in api.list_repo_tree("user/m", *args, **kw))
[large] = api.get_paths_info("user/m", "w.bin")
report({
    "top": tree(),
    "all": tree(recursive=True),
    "below": tree("d"),
    "absent": outcome(lambda: tree("nothing")),
    "info": sorted(e.path for e in api.get_paths_info("user/m", ["d", "d/3.txt", "nothing"])),
    "large": [large.size, large.lfs.sha256, large.lfs.pointer_size, large.blob_id],
    "commits": len(api.list_repo_commits("user/m")),
})
"""
    with HubServer(page_size=3) as server:
        server.add_repo("user/m", files)
        for i in range(5):
            server.add_commit("user/m", {"n.txt": str(i)})
        found = run(server, tmp_path, script)
        entry = server.history("user/m")[0].files["w.bin"]
        pages = [e.query for e in server.log.matching("GET", "/commits/main")]
    assert pages == ["", "cursor=3", "cursor=6"]
    assert entry.sha256 is not None
    pointer_size = len(lfs_pointer(entry.sha256, 50))
    top = [".gitattributes", "d", "n.txt", "w.bin"]
    assert found == {
        "top": top,
        "all": sorted([*top, *(p for p in files if p.startswith("d/"))]),
        "below": sorted(p for p in files if p.startswith("d/")),
        "absent": ["RemoteEntryNotFoundError", 404],
        "info": ["d", "d/3.txt"],
        "large": [50, entry.sha256, pointer_size, entry.oid],
        "commits": 7,
    }


def test_ranges_and_signatures(hub: HubServer, tmp_path: Path):
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"k": "v"}}
    ).encode()
    tensors = len(header).to_bytes(8, "little") + header + bytes(8)
    hub.add_repo("user/m", {"model.safetensors": tensors, "a.txt": "0123456789"}, private=True)
    script = """
metadata = get_safetensors_metadata("user/m")
report([metadata.parameter_count, metadata.files_metadata["model.safetensors"].metadata])
"""
    assert run(hub, tmp_path, script) == [{"F32": 2}, {"k": "v"}]
    text = f"{hub.url}/user/m/resolve/main/a.txt"
    allowed = {"Authorization": f"Bearer {READ.value}"}
    assert fetch(text, headers=allowed | {"Range": "bytes=2-4"})[:2] == (206, b"234")
    assert fetch(text, headers=allowed | {"Range": "bytes=7-"})[:2] == (206, b"789")
    assert fetch(text, headers=allowed | {"Range": "bytes=-3"})[:2] == (206, b"789")
    status, _, headers = fetch(text, headers=allowed | {"Range": "bytes=10-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */10")
    # A large file is behind a signed address, which alone gives it.
    [signed] = {f"{e.path}?{e.query}" for e in hub.log.matching("GET", "/storage/")}
    assert fetch(hub.url + signed)[:2] == (200, tensors)
    assert fetch(hub.url + signed[:-1] + "x")[0] == 403
    status, _, headers = fetch(text)
    assert (status, headers["X-Error-Code"]) == (401, "RepoNotFound")


def test_large_files_go_in_parts(tmp_path: Path):
    content = {"big.bin": bytes(range(250)) * 10, "exact.bin": b"e" * 2000, "small.bin": b"s" * 999}
    for name, data in content.items():
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(data)
    script = """
api.create_repo("m")
api.upload_folder(repo_id="user/m", folder_path=folder)
report(Path(snapshot_download("user/m"), "big.bin").read_bytes().hex())
"""
    with HubServer(lfs_part_size=1000) as server:
        pulled = run(server, tmp_path, script, folder=tmp_path / "model")
        assert bytes.fromhex(pulled) == content["big.bin"]
        assert {n: server.files("user/m")[n] for n in content} == content
        assert len(server.log.matching("PUT", "/part/")) == 3 + 2
        assert len(server.log.matching("POST", "/complete")) == 2
        assert len(server.log.matching("PUT", "/lfs/[0-9a-f]+$")) == 1

        oid = hashlib.sha256(b"12" * 1000).hexdigest()
        wanted = {
            "operation": "upload",
            "transfers": ["multipart"],
            "objects": [{"oid": oid, "size": 2000}],
        }
        batch = f"{server.url}/user/m.git/info/lfs/objects/batch"
        allowed = {"Authorization": f"Bearer {WRITE.value}"}
        answer = json.loads(fetch(batch, json.dumps(wanted).encode(), headers=allowed)[1])
        upload = answer["objects"][0]["actions"]["upload"]
        _, _, headers = fetch(upload["header"]["1"], b"12" * 500, method="PUT")
        part = {"partNumber": 1, "etag": headers["ETag"]}
        missing = {"partNumber": 2, "etag": headers["ETag"]}
        complete = json.dumps({"oid": oid, "parts": [part, missing]}).encode()
        status, answer, _ = fetch(upload["href"], complete)
        assert status == 400
        assert b"InvalidPart" in answer


def test_what_no_client_should_send_is_refused(hub: HubServer):
    hub.add_repo("user/m", {"w.bin": b"w"})
    before = hub.history("user/m")
    allowed = {"Authorization": f"Bearer {WRITE.value}"}
    oid = hashlib.sha256(b"right").hexdigest()

    def post(path: str, *lines: dict) -> tuple[int, bytes]:
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        return fetch(hub.url + path, body, headers=allowed)[:2]

    wanted = {"operation": "upload", "objects": [{"oid": oid, "size": 5}]}
    status, answer = post("/user/m.git/info/lfs/objects/batch", wanted)
    href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
    assert status == 200
    assert fetch(href, b"wrong", method="PUT")[0] == 400
    assert fetch(href.partition("?")[0], b"right", method="PUT")[0] == 403
    assert post("/user/m.git/info/lfs/objects/verify", {"oid": oid, "size": 5})[0] == 422

    def commit(kind: str, **value: object) -> tuple[int, bytes]:
        header = {"key": "header", "value": {"summary": "s"}}
        return post("/api/models/user/m/commit/main", header, {"key": kind, "value": value})

    pointer = {"algo": "sha256", "oid": oid, "size": 5}
    large = base64.b64encode(bytes(11 * 2**20)).decode()
    refused = [
        (commit("lfsFile", path="x.bin", **pointer), "does not exist"),
        (commit("file", path="x", content=large, encoding="base64"), "larger than 10 MiB"),
        (commit("file", path="x", content="?", encoding="base64"), "Invalid content"),
        (commit("file", path="a/../../x", content=""), "Invalid path"),
        (commit("rename", path="x"), "unknown operation"),
        (post("/api/models/user/m/commit/main"), "a header"),
    ]
    for (status, answer), reason in refused:
        assert status == 400
        assert reason in json.loads(answer)["error"]
    assert hub.history("user/m") == before
    assert fetch(href, b"right", method="PUT")[0] == 200
    assert commit("lfsFile", path="x.bin", **pointer)[0] == 200
    assert hub.files("user/m")["x.bin"] == b"right"
