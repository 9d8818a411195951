"""A recipe to begin with: written for a model and data that were looked at, with reasons."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from hf_lora.api import plan
from hf_lora.errors import ConfigError
from hf_lora.planning.records import Plan, size
from hf_lora.recipes.base_model import load_config, load_tokenizer, skeleton
from hf_lora.recipes.data import FILE_KINDS, Data, DataSet, Files, Part
from hf_lora.recipes.dataset import DEFAULT_LENGTH, language_rows, resolved
from hf_lora.recipes.estimate import (
    adapter_bytes,
    available_bytes,
    base_bytes,
    faster_type,
    step_bytes,
)
from hf_lora.recipes.forms import Recognized, RowFault
from hf_lora.recipes.recipe import Base
from hf_lora.recipes.rows import read_rows

MOST_ROWS = 10_000
_ROUND_TO = 64
_EXAMPLES_A_STEP = 16
_ROOM = 0.8
"""The share of the memory that a step may take: the rest is for what is not counted."""

_PLAIN = re.compile(r"[A-Za-z./][\w./-]*[A-Za-z][\w./-]*")
_MOST_LEARNED = 100_000


@dataclasses.dataclass(frozen=True)
class Looked:
    """What was found out about a model and data."""

    model: str
    data: str
    form: str
    columns: dict[str, str]
    rows: int
    """At most the first 10,000 are looked at."""

    faulty: int
    """Of these, those that cannot be used."""

    median: int
    """Tokens of a row, as the model will see it."""

    longest: int
    max_length: int
    """What all but one row in a hundred fits into."""

    chat_template: bool
    dtype: str
    """To load the base in."""

    batch_size: int
    accumulation: int
    epochs: int
    memory: int
    """Estimated bytes of a step with all weights."""

    available: int
    trained: int
    """Parameters of the adapter."""


def examples() -> dict[str, Path]:
    """Return the recipes that are shipped, by name."""
    folder = Path(str(files("hf_lora.recipes") / "examples"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def copy_example(name: str, output: Path) -> list[Path]:
    """Copy a shipped recipe and its data; returns what was written, the recipe first.

    Raises:
        ConfigError: There is no such example, or a file is there already.
    """
    known = examples()
    if name not in known:
        raise ConfigError(f"there is no example {name!r}; there are {', '.join(known)}")
    text = known[name].read_text(encoding="utf-8")
    beside = [path for path in known[name].parent.iterdir() if path.suffix in FILE_KINDS]
    wanted = [path for path in beside if path.name in text]
    written = [output, *(output.parent / path.name for path in wanted)]
    for path in written:
        _check_free(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    for source, path in zip(wanted, written[1:], strict=True):
        shutil.copyfile(source, path)
    output.write_text(text.replace(f"{name}.yaml", output.name), encoding="utf-8")
    return written


def begin(
    model: str,
    data: str,
    output: Path,
    *,
    split: str = "train",
    gguf_file: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Looked:
    """Look at a model and data, and write a recipe for them.

    Args:
        model: A folder, or an id on the Hub. Its weights are not loaded.
        data: A file, or the id or folder of a data set.
        output: The recipe's file.
        split: Of a data set.
        gguf_file: A GGUF file in that folder or repo.
        progress: Called with the number of rows read.

    Raises:
        ConfigError: The recipe is there already, or one of the two cannot be used.
    """
    _check_free(output)
    source: Files | DataSet
    if Path(data).suffix in FILE_KINDS:
        if not Path(data).is_file():
            raise ConfigError(f"there is no file {data}")
        source = Files((Path(data),))
    else:
        source = DataSet(dataset=data, split=split)
    base = Base(model=model, gguf_file=gguf_file)
    config, tokenizer = load_config(base), load_tokenizer(base)
    section = resolved(Part(source=source), Data(train=source))
    lengths, faulty = _lengths(section, source, tokenizer, progress)
    found = plan(skeleton(config))
    looked = _looked(
        model, data, section, lengths, faulty, config, found, bool(tokenizer.chat_template)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_text(looked, source, base, output, found), encoding="utf-8")
    return looked


def _check_free(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"{path} is there already; say another name with --output")


def _lengths(
    data: Data, source: Files | DataSet, tokenizer: Any, progress: Callable[[int], None]
) -> tuple[list[int], int]:
    shape = language_rows(tokenizer, data, _MOST_LEARNED)
    lengths: list[int] = []
    faults: list[str] = []
    for number, (where, row) in enumerate(read_rows(source, data), 1):
        progress(number)
        try:
            example, _ = shape(row)
            lengths += [] if example is None else [len(example["input_ids"])]
        except RowFault as fault:
            faults.append(f"{where}: {fault}")
        if number == MOST_ROWS:
            break
    if not lengths:
        first = f"; {faults[0]}" if faults else ""
        raise ConfigError(f"{source}: there is nothing in it to learn from{first}")
    return sorted(lengths), len(faults)


def _looked(
    model: str,
    data: str,
    section: Data,
    lengths: list[int],
    faulty: int,
    config: Any,
    found: Plan,
    template: bool,
) -> Looked:
    can = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    fits = lengths[min(len(lengths) - 1, int(len(lengths) * 0.99))]
    longest = min(can, max(_ROUND_TO, -(-fits // _ROUND_TO) * _ROUND_TO))
    stored = config.dtype or torch.float32
    faster = faster_type(stored)
    dtype = getattr(torch, faster) if faster else stored
    itemsize = dtype.itemsize
    weights, available = base_bytes(found, dtype) + adapter_bytes(found), available_bytes()
    few = max(1, min(_EXAMPLES_A_STEP, len(lengths) // 4))
    batch = 1
    while 2 * batch <= few and (
        weights + step_bytes(config, 2 * batch * longest, itemsize) < _ROOM * available
    ):
        batch *= 2
    return Looked(
        model=model,
        data=data,
        form=section.form or "text",
        columns=dict(section.columns),
        rows=len(lengths) + faulty,
        faulty=faulty,
        median=lengths[len(lengths) // 2],
        longest=lengths[-1],
        max_length=longest,
        chat_template=template,
        dtype=faster or "auto",
        batch_size=batch,
        accumulation=max(1, few // batch),
        epochs=3 if len(lengths) < MOST_ROWS else 1,
        memory=weights + step_bytes(config, batch * longest, itemsize),
        available=available,
        trained=found.parameters,
    )


def _text(looked: Looked, source: Files | DataSet, base: Base, output: Path, found: Plan) -> str:
    form = str(Recognized(looked.form, looked.columns))  # type: ignore[arg-type]
    counted = f"{looked.rows:,}" if looked.rows < MOST_ROWS else f"the first {looked.rows:,}"
    learned = "all" if looked.form == "text" else "completions"
    why = {
        "all": "every token is learned",
        "completions": "learn the answers; the questions are read, not learned",
    }[learned]
    lines = [
        f"# {looked.model}, trained on {looked.data}",
        "#",
        f"#   hf-lora train {output.name} --dry-run    # rows as the model will see them",
        f"#   hf-lora train {output.name}",
        "#",
        "# Paths are relative to this file. Any field can be set on the command line:",
        f"#   hf-lora train {output.name} --lr 1e-4 --epochs 1 --set lora.dropout=0.05",
        "",
        "base:",
        f"  model: {_quoted(_place(base.model, output))}    # {found.base_parameters:,} parameters",
        *([f"  gguf_file: {_quoted(base.gguf_file)}"] if base.gguf_file else []),
        *(
            [f"  dtype: {looked.dtype}    # 16-bit products are slow on this machine"]
            if looked.dtype != "auto"
            else []
        ),
        "  # load_in_4bit: true          # QLoRA: a quarter of the memory for the frozen weights",
        "",
        "data:",
        f"  train: {_source(source, output)}",
        f"  form: {looked.form}    # told from the columns: {form}; {counted} rows",
    ]
    if looked.columns:
        pairs = ", ".join(f"{usual}: {_quoted(name)}" for usual, name in looked.columns.items())
        lines.append(f"  columns: {{{pairs}}}")
    if looked.form in ("chat", "sharegpt", "alpaca") and looked.chat_template:
        lines.append("  # each row goes through the tokenizer's chat template")
    if looked.faulty:
        lines.append(f"  # {looked.faulty} of these rows cannot be used: --dry-run names them")
    if looked.rows >= 20:
        lines.append("  eval: 0.1                     # the share of the rows that is held out")
    else:
        lines.append("  # eval: 0.1                   # too few rows to hold some out")
    lines += [
        f"  loss: {learned}    # {why}",
        f"  max_length: {looked.max_length}    # tokens; rows have {looked.median:,} in the middle"
        f" and {looked.longest:,} at most",
        "",
        "lora:",
        "  targets: all-linear           # or attention, mlp, or patterns such as [q_proj, v_proj]",
        f"  r: {found.config.r}    # rank: {found.parameters:,} parameters are trained",
        f"  alpha: {found.config.alpha:g}    # strength: the best rate hardly depends on r",
        "",
        "trainer:                        # every argument of transformers.TrainingArguments",
        "  learning_rate: 2e-4           # a list tries each and keeps the best on eval",
        f"  num_train_epochs: {looked.epochs}",
        f"  per_device_train_batch_size: {looked.batch_size}    # about "
        f"{size(looked.memory)} in a step; there are {size(looked.available)}",
        f"  gradient_accumulation_steps: {looked.accumulation}    # "
        f"{looked.batch_size * looked.accumulation} rows in a step",
        "  lr_scheduler_type: cosine",
        "  warmup_steps: 0.03            # a share of all steps",
        "  logging_steps: 5",
    ]
    if looked.rows >= 20:
        lines.append("  eval_strategy: epoch")
    lines += [
        "",
        f"output: {_quoted(output.stem + '-adapter')}    # the adapter folder",
        "",
        "# push:                         # to the Hub, when it is trained",
        "#   repo_id: me/name",
        "#   private: true",
    ]
    return "\n".join(map(_aligned, lines)) + "\n"


def _aligned(line: str) -> str:
    """Put the comment after a value where the others stand."""
    value, mark, comment = line.partition("    # ")
    return f"{value:<31} # {comment}" if mark and not line.startswith("#") else line


def _place(name: str, output: Path) -> str:
    """Return a path as the recipe's folder sees it; what is no path is an id on the Hub."""
    path = Path(name)
    return os.path.relpath(path, output.parent) if path.exists() else name


def _source(source: Files | DataSet, output: Path) -> str:
    if isinstance(source, Files):
        return _quoted(_place(str(source.paths[0]), output))
    place = _quoted(_place(source.dataset, output))
    return f"{{dataset: {place}, split: {_quoted(source.split)}}}"


def _quoted(text: str) -> str:
    """Return text as YAML takes it for text."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
