"""A server that dies, stumbles, loses answers and cuts downloads, and the guards of `HubServer`."""

import hashlib
import json
import socket
import urllib.error
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from . import WRITE, Answer, CutDownload, Die, HubServer, LoseAnswer, hub_environment, run_python
from .calls import DIRECT, fetch

PUSH = """
from huggingface_hub import HfApi
HfApi().upload_folder(repo_id="user/m", folder_path=folder)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of three megabytes: more than the sockets between client and server can hold."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 12_000)
    return folder


def holds(hub: HubServer, folder: Path) -> bool:
    files = hub.files("user/m")
    return all(files.get(path.name) == path.read_bytes() for path in folder.iterdir())


def test_the_client_outlives_a_server_that_dies_in_an_upload(
    hub: HubServer, tmp_path: Path, folder: Path
):
    hub.add_repo("user/m")
    url = hub.url
    hub.fail("PUT", "/lfs/", Die(after_bytes=100_000, back_after=0.5))
    run_python(PUSH, hub_environment(hub, tmp_path), folder=folder)
    assert hub.url == url
    assert holds(hub, folder)
    assert len(hub.log.commits) == 1
    # The death, then the client's own second try.
    assert [e.status for e in hub.log.matching("PUT", "/lfs/")] == [None, 200]


def test_a_push_can_be_repeated_after_the_server_died(hub: HubServer, tmp_path: Path, folder: Path):
    """The commit is the one call that the client does not repeat by itself."""
    hub.add_repo("user/m")
    environment = hub_environment(hub, tmp_path)
    hub.fail("POST", "/commit/", Die(after_bytes=10))
    failed = run_python(PUSH, environment, folder=folder, fails=True)
    assert "RemoteProtocolError" in failed.stderr or "ReadError" in failed.stderr
    with pytest.raises(urllib.error.URLError, match="refused"):
        DIRECT.open(hub.url)
    assert not holds(hub, folder)

    hub.start()
    run_python(PUSH, environment, folder=folder)
    assert holds(hub, folder)
    assert len(hub.log.commits) == 1
    assert len(hub.log.matching("PUT", "/lfs/")) == 1, "what is stored is not sent again"


def test_half_an_upload_is_no_upload(hub: HubServer, folder: Path):
    hub.add_repo("user/m")
    content = (folder / "model.safetensors").read_bytes()
    wanted = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    batch = json.dumps({"operation": "upload", "objects": [wanted]}).encode()
    allowed = {"Authorization": f"Bearer {WRITE.value}"}
    _, answer, _ = fetch(f"{hub.url}/user/m.git/info/lfs/objects/batch", batch, headers=allowed)
    href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
    stored = dict(hub.hub.content)
    hub.fail("PUT", "/lfs/", Die(after_bytes=len(content) // 2))
    with pytest.raises(OSError):
        fetch(href, content, method="PUT")
    assert hub.hub.content == stored
    hub.start()
    assert fetch(href, content, method="PUT")[0] == 200
    assert hub.hub.content == stored | {wanted["oid"]: content}


def test_a_lost_answer_leaves_the_commit(hub: HubServer, tmp_path: Path, folder: Path):
    hub.add_repo("user/m")
    environment = hub_environment(hub, tmp_path)
    hub.fail("POST", "/commit/", LoseAnswer())
    run_python(PUSH, environment, folder=folder, fails=True)
    assert holds(hub, folder)
    commits = hub.history("user/m")
    run_python(PUSH, environment, folder=folder)
    assert hub.history("user/m") == commits


def test_errors_that_pass(hub: HubServer, tmp_path: Path, folder: Path):
    hub.add_repo("user/m")
    hub.fail("POST", "/preupload/", 500)
    hub.fail("POST", "/objects/batch", Answer(429, "Slow down", {"Retry-After": "0"}))
    hub.fail("POST", "/validate-yaml", 503, times=1)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    # The card is sent before anything else and its call is not repeated.
    first = run_python(PUSH, hub_environment(hub, tmp_path), folder=folder, fails=True)
    assert "503" in first.stderr
    assert len(hub.log) == 1
    done = run_python(PUSH, hub_environment(hub, tmp_path), folder=folder)
    assert "HTTP Error 500" in done.stderr
    assert "Rate limited" in done.stderr
    assert holds(hub, folder)
    statuses = [e.status for e in hub.log if "/preupload/" in e.path or "/batch" in e.path]
    assert statuses == [500, 200, 429, 200]


def test_a_cut_download_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path):
    # The client writes pieces of ten megabytes to disk and goes on after the last whole one.
    files = {"w.bin": bytes(range(256)) * 45_000, "config.json": b"{}"}
    hub.add_repo("user/m", files)
    hub.fail("GET", "/storage/", CutDownload(after_bytes=11 * 2**20 - 100_000))
    hub.fail("GET", "/config.json", CutDownload(after_bytes=1))
    script = """
    from pathlib import Path
    from huggingface_hub import snapshot_download
    report(snapshot_download("user/m"))
    """
    pulled = Path(run_python(script, hub_environment(hub, tmp_path)).value)
    assert {name: (pulled / name).read_bytes() for name in files} == files
    downloads = hub.log.matching("GET", "/storage/")
    assert [(e.status, e.headers.get("range")) for e in downloads] == [
        (200, None),
        (206, f"bytes={10 * 2**20}-"),
    ]


def test_a_hub_without_xet(hub: HubServer, tmp_path: Path, folder: Path):
    """With Xet left on, the client has no way to upload here: it does not fall back to LFS."""
    hub.add_repo("user/m")
    failed = run_python(PUSH, hub_environment(hub, tmp_path, xet=True), folder=folder, fails=True)
    assert "ConnectionError" in failed.stderr
    assert "xet-write-token" in failed.stderr
    assert {e.status for e in hub.log.matching("GET", "xet-write-token")} == {404}
    assert not hub.log.commits


def test_the_port_stays_taken_while_the_server_is_down(hub: HubServer):
    hub.stop()
    with socket.socket() as intruder, pytest.raises(OSError, match="in use"):
        intruder.bind(("127.0.0.1", urlsplit(hub.url).port or 0))
    hub.start()
    with DIRECT.open(f"{hub.url}/api/agent-harnesses") as answer:
        assert answer.status == 200


def test_leaving_the_block_tells_what_went_unnoticed():
    def use(action: Callable[[HubServer], object]) -> None:
        with HubServer() as server:
            action(server)

    def ask(path: str, body: bytes | None = None) -> Callable[[HubServer], object]:
        def action(server: HubServer) -> None:
            with pytest.raises(urllib.error.HTTPError, match=r"404|500"):
                DIRECT.open(server.url + path, data=body)

        return action

    def unrelated(server: HubServer) -> None:
        server.fail("GET", "/never", 500)
        raise ZeroDivisionError

    with pytest.raises(AssertionError, match="struck 0 of 2 times"):
        use(lambda server: server.fail("GET", "/never", 500, times=2))
    with pytest.raises(AssertionError, match="no such route: GET /api/spaces/x"):
        use(ask("/api/spaces/x"))
    with pytest.raises(AssertionError, match="KeyError: 'content'"):
        use(ask("/api/validate-yaml", b"{}"))
    with pytest.raises(ZeroDivisionError):  # the test's own failure is the one to show
        use(unrelated)


def test_faults_strike_in_order_after_those_they_skip(hub: HubServer):
    def status() -> int:
        try:
            with DIRECT.open(f"{hub.url}/api/agent-harnesses") as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    hub.fail("GET", "/agent", 503, skip=1, times=2)
    hub.fail("GET", "/agent", 502, skip=1)
    assert [status() for _ in range(5)] == [200, 503, 503, 502, 200]


def test_the_environment_is_that_of_the_test(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "https_proxy"):
        monkeypatch.setenv(name, "outside")
    monkeypatch.setenv("UNRELATED", "kept")
    environment = hub_environment(hub, tmp_path, token=None, offline=True, MORE="given")
    assert "outside" not in environment.values()
    assert environment["UNRELATED"] == "kept"
    assert environment["MORE"] == "given"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HF_ENDPOINT"] == hub.url


def test_scripts_show_what_went_wrong(hub: HubServer, tmp_path: Path):
    environment = hub_environment(hub, tmp_path)
    with pytest.raises(AssertionError) as failure:
        run_python("print('seen'); raise ValueError(reason)", environment, reason="the reason")
    for part in ("seen", "ValueError: the reason", "exit status 1", "raise ValueError(reason)"):
        assert part in str(failure.value)
    with pytest.raises(AssertionError, match="exit status 0"):
        run_python("pass", environment, fails=True)
    with pytest.raises(AssertionError, match="report was called 0 times"):
        _ = run_python("pass", environment).value
    endless = "print('so far', flush=True); import time; time.sleep(3600)"
    for limit in (1, 8, 64):  # until it is long enough for a script to begin
        with pytest.raises(AssertionError, match=r"still running after \S+ s") as failure:
            run_python(endless, environment, timeout=limit)
        if "so far" in str(failure.value):
            break
    assert "so far" in str(failure.value)
    outside = """
    import urllib.request
    report(repr(urllib.request.urlopen("http://example.org")))
    """
    blocked = run_python(outside, environment, fails=True)
    assert "refused" in blocked.stderr, "no request leaves this machine"
