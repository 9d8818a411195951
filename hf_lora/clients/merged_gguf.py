"""A merged model as llama.cpp reads it, through its own converter: what no adapter file can say.

llama.cpp's ``convert_hf_to_gguf.py`` is not on PyPI: it comes with its source or with a package of
it for the system. It is started as a program of its own, and nothing of it is imported.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from hf_lora.clients.llama_cpp import MODELFILE
from hf_lora.errors import ConfigError, SaveError
from hf_lora.file_merging.merge import merge_checkpoint

WEIGHTS = "model.gguf"
CONVERTER = "convert_hf_to_gguf.py"

_LINES = 8
"""How many of the converter's last lines an error shows."""

_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", None: "auto"}
_HOW = (
    "Get it with `git clone https://github.com/ggml-org/llama.cpp` and name the folder: "
    'converter="llama.cpp". Or by hand: merge_checkpoint(base, adapter, "merged"), then '
    f"`python {CONVERTER} merged --outfile model.gguf`."
)


def find_converter(given: str | os.PathLike[str] | None) -> Path:
    """Return where the converter is: what was given, or what is on the PATH.

    Raises:
        ConfigError: It is not there; the message says how to come by it.
    """
    if given is not None:
        path = Path(given)
        path = path / CONVERTER if path.is_dir() else path
        if path.is_file():
            return path
        raise ConfigError(f"There is no {path}: llama.cpp's {CONVERTER} was asked for. {_HOW}")
    found = shutil.which(CONVERTER)
    if found is None:
        raise ConfigError(f"llama.cpp's {CONVERTER} is not on the PATH. {_HOW}")
    return Path(found)


def write_merged(
    adapter: Path,
    base: str | os.PathLike[str] | None,
    folder: Path,
    dtype: torch.dtype | None,
    converter: Path,
) -> list[str]:
    """Merge an adapter into its base and convert what comes of it, all in ``folder``.

    Raises:
        SaveError: The converter failed; its last lines are in the message.
        HfLoRAError: As for :func:`hf_lora.merge_checkpoint`.
    """
    merged = folder / "merged"
    try:
        merge_checkpoint(base, adapter, merged, dtype=dtype)
        command = [sys.executable, str(converter), str(merged), "--outfile", str(folder / WEIGHTS)]
        command += ["--outtype", _TYPES[dtype]]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    if done.returncode or not (folder / WEIGHTS).is_file():
        said = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-_LINES:])
        raise SaveError(f"{converter} failed with exit code {done.returncode}:\n{said}")
    (folder / MODELFILE).write_text(f"# For `ollama create NAME -f Modelfile`.\nFROM ./{WEIGHTS}\n")
    return [f"llama-cli -m FOLDER/{WEIGHTS}"]
