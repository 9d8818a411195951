"""The recipe of ``hf-lora train``: frozen records, and the checks before any model is loaded."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError
from hf_lora.recipes.fields import record, report_unknown

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
FORMS = {"text": ("text",), "completion": ("prompt", "completion"), "chat": ("messages",)}
"""Form of the data to the columns that it reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The model to adapt: a causal language model."""

    model: str
    """A folder, or an id on the Hub."""

    revision: str | None = None
    gguf_file: str | None = None
    """A GGUF file in that folder or repo, to read the weights and the tokenizer from."""

    tokenizer: str | None = None
    """Folder or id of another tokenizer than the model's."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type to load the weights in; auto: the one they are stored in."""

    load_in_4bit: bool = False
    """Quantize to NF4 with bitsandbytes while loading (QLoRA, arXiv 2305.14314)."""

    load_in_8bit: bool = False


@dataclasses.dataclass(frozen=True)
class Files:
    """Rows in files of our own reading."""

    paths: tuple[Path, ...]

    def __str__(self) -> str:
        """Return the names of the files."""
        return ", ".join(path.name for path in self.paths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """Rows in a data set that the library ``datasets`` loads."""

    dataset: str
    """An id on the Hub, or a folder."""

    name: str | None = None
    split: str = "train"
    revision: str | None = None

    def __str__(self) -> str:
        """Return the id and the split."""
        return f"{self.dataset}, split {self.split}"


Source = Files | DataSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on."""

    train: Source
    form: Literal["text", "completion", "chat"]
    """``text``: a column of it. ``completion``: a prompt and what follows it. ``chat``: messages
    with a role and a content each, put through the tokenizer's chat template."""

    eval: Source | float | None = None
    """What to evaluate on: a source, or the share of the training rows to hold out, such as 0.1."""

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of the columns, where they are not ``text``; ``prompt, completion``; ``messages``."""

    loss: Literal["all", "completions"] = "all"
    """Which tokens to learn: all, or completions (the assistant's turns in a chat) only."""

    max_length: int | None = None
    """Longer examples are cut to this many tokens; by default 1,024, or what the base can read."""

    packing: bool = False
    """Join texts and cut them into blocks of exactly ``max_length`` tokens."""

    unit: Literal["line", "paragraph", "file"] = "line"
    """What one example is in a .txt file; paragraphs are parted by empty lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Push:
    """Where the adapter goes on the Hub when it is trained."""

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    base: str | None = None
    """Hub id of the base to name, where ``base.model`` is a folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. Paths in it are relative to the folder that the recipe is in."""

    base: Base
    data: Data
    output: Path
    """The adapter folder that will be written."""

    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    trainer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of transformers' ``TrainingArguments``; ``learning_rate``, 2e-4 unless it is given,
    may be a list."""

    push: Push | None = None

    @property
    def digest(self) -> str:
        """A digest of everything that decides the result."""
        fields = dataclasses.asdict(dataclasses.replace(self, push=None, output=Path()))
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def as_recipe(content: Mapping[str, Any], folder: Path, problems: list[str]) -> Recipe | None:
    """Build a recipe from what a file says; report what is wrong and return None if anything is.

    Args:
        content: The file's content.
        folder: The folder that its paths are relative to.
        problems: One line each is added.
    """
    before = len(problems)
    recipe = record(
        Recipe,
        content,
        "",
        problems,
        {
            "base": lambda value: _base(value, folder, problems),
            "data": lambda value: _data(value, folder, problems),
            "lora": lambda value: _lora(value, problems),
            "output": lambda value: _output(value, folder, problems),
            "trainer": lambda value: _mapping(value, "trainer", problems),
            "push": lambda value: value and _push(value, problems),
        },
    )
    return recipe if len(problems) == before else None


def _base(value: Any, folder: Path, problems: list[str]) -> Base | None:
    base = record(Base, {"model": value} if isinstance(value, str) else value, "base", problems)
    if base is None:
        return None
    quantized = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(base, name)]
    if len(quantized) > 1:
        problems.append("base: load_in_4bit and load_in_8bit exclude each other")
    if quantized and base.gguf_file:
        problems.append(f"base.{quantized[0]}: transformers cannot quantize a GGUF file again")
    names = {name: getattr(base, name) for name in ("model", "tokenizer")}
    for name, said in names.items():
        if said is not None:
            names[name] = _folder_or_id(said, folder, f"base.{name}", problems)
    return dataclasses.replace(base, **names)


def _folder_or_id(said: str, folder: Path, label: str, problems: list[str]) -> str:
    if (folder / said).exists():
        return str((folder / said).resolve())
    try:
        validate_repo_id(said)
    except HFValidationError:
        problems.append(f"{label}: {folder / said} is no folder, and {said!r} no id on the Hub")
    return said


def _data(value: Any, folder: Path, problems: list[str]) -> Data | None:
    data = record(
        Data,
        value,
        "data",
        problems,
        {
            "train": lambda said: _source(said, folder, "data.train", problems),
            "eval": lambda said: _eval(said, folder, problems),
            "columns": lambda said: _mapping(said, "data.columns", problems),
        },
    )
    if data is None:
        return None
    report_unknown(data.columns, FORMS[data.form], "data.columns", problems)
    for name, column in data.columns.items():
        if not isinstance(column, str):
            problems.append(f"data.columns.{name}: {column!r} is not the name of a column")
    if data.form == "text" and data.loss == "completions":
        problems.append("data.loss: plain text has no completions; use all, or another form")
    if data.form != "text" and data.packing:
        problems.append(f"data.packing: for text only, the form is {data.form}")
    if data.max_length is not None and data.max_length < 2:
        problems.append(f"data.max_length: {data.max_length} is less than 2 tokens")
    return data


def _eval(said: Any, folder: Path, problems: list[str]) -> Source | float | None:
    if said is None:
        return None
    if isinstance(said, (str, list, Mapping)):
        return _source(said, folder, "data.eval", problems)
    if not isinstance(said, float) or not 0 < said < 1:
        problems.append(f"data.eval: {said!r} is neither a source nor a share between 0 and 1")
        return None
    return said


def _source(said: Any, folder: Path, label: str, problems: list[str]) -> Source | None:
    if isinstance(said, Mapping):
        source = record(DataSet, said, label, problems)
        if source is None:
            return None
        dataset = _folder_or_id(source.dataset, folder, f"{label}.dataset", problems)
        return dataclasses.replace(source, dataset=dataset)
    names = [said] if isinstance(said, str) else said
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        problems.append(
            f"{label}: {said!r} is not a file, a list of files, or a mapping with dataset: ID"
        )
        return None
    paths = [folder / name for name in names]
    for name, path in zip(names, paths, strict=True):
        if path.suffix not in FILE_KINDS:
            problems.append(
                f"{label}: {name} does not end in {', '.join(FILE_KINDS)}; a data set on the Hub "
                f"or in a folder is written {{dataset: {name}}}"
            )
        elif not path.is_file():
            problems.append(f"{label}: there is no file {path}")
    return Files(tuple(paths))


def _lora(value: Any, problems: list[str]) -> LoRAConfig | None:
    if not isinstance(value, Mapping):
        problems.append(f"lora: {value!r} is not a mapping of fields")
        return None
    known = [field.name for field in dataclasses.fields(LoRAConfig)]
    report_unknown(value, known, "lora", problems)
    try:
        return LoRAConfig(**{name: value[name] for name in known if name in value})
    except ConfigError as error:
        lines = str(error).splitlines()
        problems.extend(f"lora.{line.removeprefix('  - ')}" for line in lines[1:] or lines)
        return None


def _output(value: Any, folder: Path, problems: list[str]) -> Path:
    if not isinstance(value, str) or not value:
        problems.append(f"output: {value!r} is not the name of a folder")
        return folder
    return folder / value


def _mapping(value: Any, label: str, problems: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        problems.append(f"{label}: {value!r} is not a mapping of fields")
        return {}
    return dict(value)


def _push(value: Any, problems: list[str]) -> Push | None:
    push = record(Push, value, "push", problems)
    for name in ("repo_id", "base"):
        said = getattr(push, name, None)
        if said is None:
            continue
        try:
            validate_repo_id(said)
        except HFValidationError as error:
            problems.append(f"push.{name}: {next(iter(str(error).splitlines()))}")
    return push
