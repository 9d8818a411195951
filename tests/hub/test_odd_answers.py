"""A server that is no Hub: each of its answers is one HubError, and no token is in any text."""

import dataclasses
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_lora.hub.errors import reading
from tests.hub.hub_worker import Worker

TOKEN = "secret-of-a-server-of-ones-own"
COMMIT = "a" * 40


@dataclasses.dataclass
class Odd:
    """What the server says to everything."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class Server(http.server.ThreadingHTTPServer):
    """Says the same to everybody; in a body or a header, ``{sent}`` is what the client sent."""

    daemon_threads = True
    answer = Odd()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        answer, sent = self.server.answer, str(self.headers.get("authorization"))
        body = answer.body.replace("{sent}", sent).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value.replace("{sent}", sent))
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and answer.status not in (204, 304):
            self.wfile.write(body)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def worker(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    home = tmp_path_factory.mktemp("odd")
    url = f"http://127.0.0.1:{server.server_port}"
    worker = Worker(url, home, token=TOKEN)  # type: ignore[arg-type]
    worker.run(
        """
        import builtins, time, traceback
        time.sleep = lambda seconds: None  # the client waits between its tries
        builtins.MODEL = hf_lora.wrap(tiny_model(), ["q_proj"], r=2)

        def said(call, *args, **options):
            try:
                call(*args, **options)
            except Exception as error:
                return type(error).__name__, str(error), traceback.format_exc()
            return "nothing", "", ""

        builtins.said = said
        """
    )
    yield worker
    worker.close()


VERBS = {
    "push": 'hf_lora.push_to_hub, MODEL, "user/r"',
    "pull request": 'hf_lora.push_to_hub, MODEL, "user/r", create_pr=True',
    "load": 'hf_lora.load, tiny_model(), "user/r"',
    "revision": 'hf_lora.load, tiny_model(), "user/r", revision="v1", subfolder="x"',
}
SHAPES = [
    *("", "[]", "{}", "null", "1", '"x"', "[[]]", "<html>Log in to the wi-fi</html>", "\ufeff{}"),
    '{"url": 1, "commitUrl": [], "siblings": 1, "id": {}}',
    '{"url": "https://elsewhere/a/b/c/d", "name": "../../x", "private": "yes"}',
    '{"error": {"message": [1]}}',
    '[{"error": [1]}]',
    '{"error": "{sent}", "url": "{sent}"}',
    "[" * 3000,
    '{"url": "' + "u" * 100_000 + '"}',
]
STATUSES = [
    200,
    201,
    204,
    206,
    304,
    400,
    401,
    402,
    403,
    404,
    405,
    409,
    410,
    412,
    413,
    418,
    422,
    429,
]
STATUSES += [451, 500, 501, 502, 503, 504, 505, 511, 520, 599]


def ask(server: Server, worker: Worker, answer: Odd, verb: str) -> str:
    """Let the server answer so; check that one HubError came of it, and return its text."""
    server.answer = answer
    kind, text, trace = worker.run(f"report(said({VERBS[verb]}))")
    context = f"{verb}: {answer.status} {answer.body[:60]!r} {answer.headers}\n{trace[-3000:]}"
    assert kind == "HubError", context
    assert TOKEN not in text, context
    assert TOKEN not in trace, context
    assert text.isprintable(), context
    assert len(text) < 2500, context
    return text


def test_two_hundred_answers(server: Server, worker: Worker):
    verbs = itertools.cycle(VERBS)
    cases = [(status, body) for body in SHAPES for status in (200, 403, 500, 501)]
    cases += [(status, SHAPES[i % len(SHAPES)]) for i, status in enumerate(STATUSES * 5)]
    for status, body in cases:
        ask(server, worker, Odd(status, body, {"X-Error-Message": "{sent}"}), next(verbs))
    assert len(cases) >= 200


@pytest.mark.parametrize("verb", VERBS)
def test_the_call_the_status_and_the_text_are_told(server: Server, worker: Worker, verb: str):
    said = ask(server, worker, Odd(200, "<html>Log in to the wi-fi</html>"), verb)
    assert "does not answer as a Hub" in said
    if "load" in VERBS[verb]:  # which asks for headers alone
        assert "HEAD /user/r/resolve/" in said
        assert "gave HTTP 200" in said
    else:
        assert "POST /api/repos/create gave HTTP 200 and '<html>Log in to the wi-fi</html>'" in said


def test_what_never_will_be_done_is_not_to_be_tried_again(server: Server, worker: Worker):
    for status in (501, 505, 511):
        assert "try again" not in ask(
            server, worker, Odd(status, json.dumps({"error": "no"})), "push"
        )
    for status in (500, 502, 503, 504):
        assert "try again" in ask(server, worker, Odd(status, "{}"), "push")


def test_a_redirect_in_a_circle(server: Server, worker: Worker):
    ask(server, worker, Odd(302, "", {"Location": "/circle"}), "load")
    ask(server, worker, Odd(307, "", {"Location": "/api/repos/create"}), "push")


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag", "ETag"])
@pytest.mark.parametrize(
    "value", ["../../../../../escaped", "..", "/tmp/escaped", "x" * 5000, "a\\b"]
)
def test_names_that_would_leave_the_cache(
    server: Server, worker: Worker, tmp_path: Path, header: str, value: str
):
    sound = {"X-Repo-Commit": COMMIT, "ETag": '"abc"', "X-Linked-Size": "2"}
    before = {path for path in worker.home.rglob("*") if "huggingface" not in path.parts}
    said = ask(server, worker, Odd(200, "{}", sound | {header: f'"{value}"'}), "load")
    assert header in said
    assert "out of the cache" in said
    assert {path for path in worker.home.rglob("*") if "huggingface" not in path.parts} == before
    assert not Path("/tmp/escaped").exists()
    assert not list(worker.home.rglob("*escaped*"))


def test_a_session_that_the_client_makes_anew_is_looked_at_too(server: Server, worker: Worker):
    """A broken connection, which a server can bring about, makes the client begin another."""
    worker.run("from huggingface_hub.utils import close_session; close_session()")
    headers = {"X-Repo-Commit": COMMIT, "ETag": '"../../escaped"'}
    server.answer = Odd(200, "{}", headers)
    kind, text, _ = worker.run(
        """
        from hf_lora.hub import answers as hub_answers
        from huggingface_hub import get_session
        from huggingface_hub.utils import close_session
        with hub_answers.watched():
            close_session()
            report(said(get_session().head, os.environ["HF_ENDPOINT"] + "/user/r"))
        """
    )
    assert (kind, "out of the cache" in text) == ("HubError", True)
    worker.run(
        """
        from huggingface_hub import get_session
        from hf_lora.hub import answers as hub_answers
        # and what hf_lora has not asked for is none of its business
        assert get_session().head(os.environ["HF_ENDPOINT"] + "/user/r").status_code == 200
        assert get_session().event_hooks["response"].count(hub_answers._see) == 1
        """
    )


def test_a_fault_of_our_own_is_no_hub_error():
    namespace = {"__name__": "hf_lora.somewhere"}
    exec("def fault():\n    return {}['ours']", namespace)
    with pytest.raises(KeyError), reading("user/r", None):
        namespace["fault"]()
