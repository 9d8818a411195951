"""The recipe's ``data`` section: sources, their forms and shares, and the checks before reading."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from hf_lora.peft_names import hint
from hf_lora.recipes.fields import folder_or_id, mapping, record, report_unknown
from hf_lora.recipes.forms import FORMS, MAY_HAVE, Form, template_columns

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One of several sources that are mixed."""

    source: "Files | DataSet"
    share: float | None = None
    """Its part of the examples, as a weight beside those of the others; all of it without one."""

    form: Form | None = None
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Return the source's name."""
        return str(self.source)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Several sources, each with a form and a share of its own."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        """Return the names of the sources."""
        return "; ".join(map(str, self.parts))


Source = Files | DataSet | Mix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on."""

    train: Source
    """A file, a list of files, ``{dataset: ID}``; or a list of mappings with a ``path`` or a
    ``dataset`` each, and a ``share``, a ``form`` and ``columns`` of its own."""

    form: Form | None = None
    """What the rows are; told from the columns unless it is given. ``text``: a column of it.
    ``completion``: a prompt and what follows it. ``chat``: messages with a role and a content each,
    put through the tokenizer's chat template; ``sharegpt``: the same as conversations with from and
    value. ``alpaca``: instruction, input, output. ``preference``: a chosen and a rejected answer;
    ``label``: a text and its class."""

    eval: Source | float | None = None
    """What to evaluate on: a source, or the share of the training rows to hold out, such as 0.1."""

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of the columns, where they are not the form's own: ``{prompt: question}``."""

    prompt: str | None = None
    """A template that makes the prompt out of columns: ``"Question: {question}\\nAnswer:"``."""

    completion: str | None = None
    """Likewise, what follows it."""

    system: str | None = None
    """What the system says first in a chat that does not begin with it."""

    loss: Literal["all", "completions"] = "all"
    """Which tokens to learn: all, or completions (the assistant's turns in a chat) only."""

    max_length: int | None = None
    """Longer examples are cut to this many tokens; by default 1,024, or what the base can read."""

    packing: bool = False
    """Join texts and cut them into blocks of exactly ``max_length`` tokens."""

    unit: Literal["line", "paragraph", "file"] = "line"
    """What one example is in a .txt file; paragraphs are parted by empty lines."""


def as_data(
    value: Any, folder: Path, problems: list[str], hints: Callable[[str], str] = hint
) -> Data | None:
    """Build the section from what a file says; report what is wrong."""
    data = record(
        Data,
        value,
        "data",
        problems,
        {
            "train": lambda said: source_of(said, folder, "data.train", problems),
            "eval": lambda said: _eval(said, folder, problems),
            "columns": lambda said: mapping(said, "data.columns", problems),
        },
        hints,
    )
    if data is None:
        return None
    _check_columns(data.columns, data.form, "data.columns", problems)
    if data.form == "text" and data.loss == "completions":
        problems.append("data.loss: plain text has no completions; use all, or another form")
    if data.form not in (None, "text") and data.packing:
        problems.append(f"data.packing: for text only, the form is {data.form}")
    if data.max_length is not None and data.max_length < 2:
        problems.append(f"data.max_length: {data.max_length} is less than 2 tokens")
    _check_templates(data, problems)
    return data


def _check_columns(said: Mapping[str, str], form: str | None, where: str, problems: list) -> None:
    if form is not None:
        known = (*FORMS[form], *MAY_HAVE.get(form, ()))
        report_unknown(said, known, where, problems)
    elif said:
        problems.append(f"{where}: say the form, too")
    for name, column in said.items():
        if not isinstance(column, str):
            problems.append(f"{where}.{name}: {column!r} is not the name of a column")


def _check_templates(data: Data, problems: list[str]) -> None:
    given = [name for name in ("prompt", "completion") if getattr(data, name) is not None]
    for name in given:
        try:
            template_columns(getattr(data, name))
        except ValueError as error:
            problems.append(f"data.{name}: {error}")
    if given and data.form not in ("completion", "chat"):
        problems.append(f"data.{given[0]}: a template needs form: completion, or form: chat")
    elif data.completion is not None and data.prompt is None:
        problems.append("data.completion: a template for it needs one for the prompt, too")


def _eval(said: Any, folder: Path, problems: list[str]) -> Source | float | None:
    if said is None:
        return None
    if isinstance(said, (str, list, Mapping)):
        return source_of(said, folder, "data.eval", problems)
    if not isinstance(said, float) or not 0 < said < 1:
        problems.append(f"data.eval: {said!r} is neither a source nor a share between 0 and 1")
        return None
    return said


def source_of(said: Any, folder: Path, label: str, problems: list[str]) -> Source | None:
    """Build a source from what a file says; report what is wrong."""
    if isinstance(said, Mapping) and (said.keys() & {"path", "share", "form", "columns"}):
        said = [said]
    if isinstance(said, list) and any(isinstance(each, Mapping) for each in said):
        return _mix(said, folder, label, problems)
    return _single(said, folder, label, problems)


def _mix(said: list[Any], folder: Path, label: str, problems: list[str]) -> Mix | None:
    before = len(problems)
    parts = []
    for number, each in enumerate(said, 1):
        where = f"{label}, source {number}"
        fields = dict(each) if isinstance(each, Mapping) else {"path": each}
        share, form = fields.pop("share", None), fields.pop("form", None)
        columns = mapping(fields.pop("columns", {}), f"{where}.columns", problems)
        if share is not None and (isinstance(share, bool) or not _is_positive(share)):
            problems.append(f"{where}.share: {share!r} is not a number above 0")
        if form is not None and form not in get_args(Form):
            problems.append(f"{where}.form: {form!r} is not one of {', '.join(FORMS)}")
        else:
            _check_columns(columns, form, f"{where}.columns", problems)
        inner = fields.pop("path") if set(fields) == {"path"} else fields
        source = _single(inner, folder, where, problems)
        if source is not None:
            parts.append(Part(source=source, share=share, form=form, columns=columns))
    shared = sum(part.share is not None for part in parts)
    if shared not in (0, len(parts)):
        problems.append(f"{label}: either every source has a share, or none has")
    return Mix(tuple(parts)) if len(problems) == before else None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _single(said: Any, folder: Path, label: str, problems: list[str]) -> "Files | DataSet | None":
    if isinstance(said, Mapping):
        source = record(DataSet, said, label, problems)
        if source is None:
            return None
        dataset = folder_or_id(source.dataset, folder, f"{label}.dataset", problems)
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
