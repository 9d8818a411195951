"""The real client in a process of its own, because it reads its endpoint when it is imported."""

import json
import os
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked

from .accounts import WRITE, Token
from .server import HubServer

_ROOT = Path(__file__).parents[2]
_NOT_INHERITED = ("HF_", "HUGGING", "TRANSFORMERS_")


def hub_environment(
    server: HubServer | str,
    home: Path,
    *,
    token: Token | str | None = WRITE,
    offline: bool = False,
    xet: bool = False,
    **extra: str,
) -> dict[str, str]:
    """The environment of a process whose Hub is `server`, with its cache and token below `home`.

    Nothing outside is reached by accident: other hosts go through a proxy that does not exist.
    """
    kept = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(_NOT_INHERITED) and not name.lower().endswith("_proxy")
    }
    nowhere = "http://127.0.0.1:9"
    python_path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    env = kept | {
        "HF_ENDPOINT": server if isinstance(server, str) else server.url,
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HTTPS_PROXY": nowhere,
        "HTTP_PROXY": nowhere,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    if token is not None:
        env["HF_TOKEN"] = token if isinstance(token, str) else token.value
    return env | extra


@dataclass(frozen=True)
class Finished:
    """A script that ran to its end."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def value(self) -> Any:
        """What the script gave to `report`."""
        lines = [line for line in self.stdout.splitlines() if line.startswith(_MARK)]
        assert len(lines) == 1, f"report was called {len(lines)} times\n{self}"
        return json.loads(lines[0].removeprefix(_MARK))

    def __str__(self) -> str:
        return (
            f"exit status {self.returncode}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"
        )


_MARK = "@report "


def run_python(
    code: str,
    env: dict[str, str],
    *,
    timeout: float = 480,
    fails: bool = False,
    **values: Any,
) -> Finished:
    """Run `code` in a process of its own, in an empty folder; show everything if it goes wrong.

    `values` are variables of the script (paths become strings). Inside it, `report(x)` hands a
    JSON value back, which is `.value` of the result. With `fails=True` the script must fail.
    """
    home = Path(env["HF_HOME"]).parent
    work = home / "work"
    work.mkdir(parents=True, exist_ok=True)
    given = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    setup = f"def report(value): print({_MARK!r} + __import__('json').dumps(value), flush=True)"
    assigned = "; ".join(f"{name} = {value!r}" for name, value in given.items()) or "pass"
    script = home / "script.py"
    script.write_text(f"{setup}\n{assigned}\n{textwrap.dedent(code).strip()}\n")
    try:
        done = forked.run_file(script, stage="torch", env=env, cwd=work, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        out, err = (text.decode() if text else "" for text in (error.stdout, error.stderr))
        message = f"still running after {timeout} s\n--- stdout\n{out}\n--- stderr\n{err}"
        raise AssertionError(message) from None
    finished = Finished(done.returncode, done.stdout, done.stderr)
    assert (finished.returncode != 0) == fails, f"{finished}\n--- script\n{script.read_text()}"
    return finished
