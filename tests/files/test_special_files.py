"""Pipes, devices and the kernel's own files in place of an adapter's: refused at once, unread."""

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_lora
from hf_lora import AdapterFileError
from hf_lora.files import opened as opening
from hf_lora.files.opened import content, opened
from hf_lora.files.write import copy_folder
from tests import tiny
from tests.files import edit

KERNELS = "/proc/kmsg" if os.geteuid() == 0 else "/proc/self/environ"


# A reader that waits for a pipe would wait for ever, and one of zeros fill the memory.
pytestmark = pytest.mark.timeout(120)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to a pipe": lambda path: (
        os.mkfifo(path.with_suffix(".pipe")),
        path.symlink_to(path.with_suffix(".pipe")),
    ),
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "the kernel's": lambda path: path.symlink_to(KERNELS),
    "the process's memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a loop of links": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [edit.WEIGHTS, edit.CONFIG])
def test_it_is_refused_at_once(tmp_path: Path, name: str, kind: str):
    tiny.saved(tmp_path)
    replace(tmp_path / name, SPECIAL[kind])
    model = tiny.Net()
    with pytest.raises(AdapterFileError):
        hf_lora.load(model, tmp_path)
    with pytest.raises(hf_lora.HfLoRAError):
        copy_folder(tmp_path, tmp_path / "copy")
    assert not (tmp_path / "copy" / edit.WEIGHTS).exists()
    hf_lora.wrap(model, "q_proj", r=2)  # nothing of it was touched


@pytest.mark.parametrize("name", [edit.WEIGHTS, edit.CONFIG])
def test_a_pipe_that_is_put_there_after_the_look(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Whatever was asked of the path before, the file that is open is what counts."""
    tiny.saved(tmp_path)
    real = os.open

    def swapping(path: os.PathLike[str], flags: int, *rest: int) -> int:
        if Path(path).name == name and not stat.S_ISFIFO(os.stat(path).st_mode):
            replace(Path(path), os.mkfifo)
        return real(path, flags, *rest)

    monkeypatch.setattr(opening.os, "open", swapping)
    with pytest.raises(AdapterFileError, match="no ordinary file"):
        hf_lora.load(tiny.Net(), tmp_path)


def test_a_file_that_grows_while_it_is_read_has_an_end(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with opened(path) as (file, size), open(path, "ab") as more:
        more.write(b"d" * 100)
        more.flush()
        assert file.read(size) == b"abc"
    assert len(content(path)) == 103


def test_a_writer_is_never_waited_for(tmp_path: Path):
    """The control: opening this pipe in the ordinary way does wait."""
    os.mkfifo(tmp_path / "pipe")
    waiting = threading.Thread(target=lambda: open(tmp_path / "pipe", "rb").close(), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    with pytest.raises(AdapterFileError, match="no ordinary file"):
        content(tmp_path / "pipe")
    os.close(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))
    waiting.join(10)


def test_a_header_whose_parts_disagree_is_refused_and_not_saved_again(tmp_path: Path):
    """A save would write the one and the other, which nobody could load."""
    tiny.saved(tmp_path, rslora=True)
    tensors, metadata = edit.read_tensors(tmp_path)
    header = json.loads(metadata["hf_lora"])
    header["config"]["rslora"] = False
    edit.write_tensors(tmp_path, tensors, {"hf_lora": json.dumps(header)})
    with pytest.raises(AdapterFileError, match="rslora is False, but not of 'layers"):
        hf_lora.load(tiny.Net(), tmp_path)
