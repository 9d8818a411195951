"""The forks that tests get instead of fresh interpreters: as fresh, as alone, and as mortal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked


def test_a_fork_has_the_arguments_settings_folder_and_streams_that_it_was_given(tmp_path: Path):
    code = """
import os, sys
print(sys.argv[1:], os.getcwd(), sorted(os.environ), __name__)
print("error", file=sys.stderr)
os.write(1, b"from below")
sys.exit("the reason")
"""
    done = forked.run_code(code, "a", "b", env={"ONLY": "1"}, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == f"['a', 'b'] {tmp_path} ['ONLY'] __main__\nfrom below"
    assert done.stderr == "error\nthe reason\n"


def test_its_standard_input_can_be_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"hello\n")
    code = "import sys; sys.exit(len(sys.stdin.readline()))"
    process = forked.Process("tests.fork_server:script", code, stdin=reader)
    assert process.wait() == 6
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(3)", 3),
        ("raise ValueError('no')", 1),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_its_exit_code_is_that_of_a_program(code: str, expected: int):
    assert forked.run_code(code).returncode == expected
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == (
        expected
    )


def test_the_traceback_and_what_was_registered_for_the_end_are_seen():
    code = "import atexit; atexit.register(print, 'at the end'); raise ValueError('no')"
    done = forked.run_code(code)
    assert done.stdout == "at the end\n"
    assert done.stderr.endswith("ValueError: no\n")


@pytest.mark.parametrize(
    ("stage", "there", "not_there"),
    [
        ("torch", {"torch"}, {"huggingface_hub", "transformers", "hf_lora"}),
        ("transformers", {"torch", "transformers.trainer", "hf_lora"}, {"deepspeed", "pytest"}),
    ],
)
def test_a_stage_has_done_its_imports_and_no_others(stage: str, there: set, not_there: set):
    code = "import sys; print(*(name for name, module in sys.modules.items() if module))"
    found = set(forked.run_code(code, stage=stage).stdout.split())
    assert there <= found
    assert not not_there & found


def test_what_one_does_no_other_sees():
    change = "import os, torch; torch.seen = 1; os.environ['SEEN'] = '1'; torch.manual_seed(3)"
    look = "import os, torch; print(hasattr(torch, 'seen'), 'SEEN' in os.environ, torch.rand(1))"
    before = forked.run_code(look).stdout
    assert forked.run_code(change).returncode == 0
    assert forked.run_code(look).stdout == before
    assert before.startswith("False False")


def test_one_that_takes_too_long_is_ended_with_its_children_and_what_it_said_is_seen(
    tmp_path: Path,
):
    code = f"""
import os, time
child = os.fork()
if child:
    print("so far")
    open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child}}\\n")
time.sleep(3600)
"""
    for limit in (0.5, 4, 32, 128):  # as long as it takes to write that, on a busy machine
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            forked.run_code(code, timeout=limit)
        if (tmp_path / "pids").is_file():
            break
    assert caught.value.stdout == b"so far\n"
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        forked.await_end(pid)


def test_one_that_nobody_waits_for_any_more_is_ended():
    process = forked.Process("time:sleep", 3600)
    pid = process.pid
    assert forked.is_running(pid)
    del process
    forked.await_end(pid)


def test_a_server_ends_with_its_forks_when_who_started_it_does(tmp_path: Path):
    code = """
import os, signal
from tests import forked
with forked.serving():
    process = forked.Process("time:sleep", 3600, stage="torch")
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {k: v for k, v in os.environ.items() if k != forked.FOLDER}
    environment["TMPDIR"] = str(tmp_path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=forked.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    forked.await_end(int(done.stdout))
