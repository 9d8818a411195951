"""The recipe of ``hf-lora train``: frozen records, and the checks before any model is loaded."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError
from hf_lora.peft_names import hint
from hf_lora.recipes.data import Data, as_data
from hf_lora.recipes.fields import folder_or_id, mapping, record, report_unknown

TaskName = Literal["language-modeling", "classification", "reward", "dpo"]


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

    task: TaskName = "language-modeling"
    """What is trained: a language model; a classifier of texts; a reward from pairs of answers, or
    a language model that prefers as they do (DPO), both by TRL's trainers."""

    continue_from: str | None = None
    """An adapter, a folder or an id on the Hub, to go on training instead of a fresh one. It says
    itself what ``lora`` would."""

    @property
    def digest(self) -> str:
        """A digest of everything that decides the result."""
        fields = dataclasses.asdict(dataclasses.replace(self, push=None, output=Path()))
        return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def as_recipe(
    content: Mapping[str, Any],
    folder: Path,
    problems: list[str],
    elsewhere: Callable[[str], str] = hint,
) -> Recipe | None:
    """Build a recipe from what a file says; report what is wrong and return None if anything is.

    Args:
        content: The file's content.
        folder: The folder that its paths are relative to.
        problems: One line each is added.
        elsewhere: What to say of a field that is unknown where it stands.
    """
    before = len(problems)
    recipe = record(
        Recipe,
        content,
        "",
        problems,
        {
            "base": lambda value: _base(value, folder, problems, elsewhere),
            "data": lambda value: as_data(value, folder, problems, elsewhere),
            "lora": lambda value: _lora(value, problems, elsewhere),
            "output": lambda value: _output(value, folder, problems),
            "trainer": lambda value: mapping(value, "trainer", problems),
            "push": lambda value: value and _push(value, problems),
            "continue_from": lambda value: _adapter(value, content, folder, problems),
        },
        elsewhere,
    )
    return recipe if len(problems) == before else None


def _base(
    value: Any, folder: Path, problems: list[str], elsewhere: Callable[[str], str]
) -> Base | None:
    base = record(
        Base,
        {"model": value} if isinstance(value, str) else value,
        "base",
        problems,
        hints=elsewhere,
    )
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
            names[name] = folder_or_id(said, folder, f"base.{name}", problems)
    return dataclasses.replace(base, **names)


def _lora(value: Any, problems: list[str], elsewhere: Callable[[str], str]) -> LoRAConfig | None:
    if not isinstance(value, Mapping):
        problems.append(f"lora: {value!r} is not a mapping of fields")
        return None
    known = [field.name for field in dataclasses.fields(LoRAConfig)]
    report_unknown(value, known, "lora", problems, elsewhere)
    try:
        return LoRAConfig(**{name: value[name] for name in known if name in value})
    except ConfigError as error:
        lines = str(error).splitlines()
        problems.extend(f"lora.{line.removeprefix('  - ')}" for line in lines[1:] or lines)
        return None


def _adapter(
    value: Any, content: Mapping[str, Any], folder: Path, problems: list[str]
) -> str | None:
    if value is None:
        return None
    if content.get("lora"):
        problems.append("continue_from: the adapter says itself what lora would; leave lora out")
    if not isinstance(value, str) or not value:
        problems.append(f"continue_from: {value!r} is not a folder or an id on the Hub")
        return None
    return folder_or_id(value, folder, "continue_from", problems)


def _output(value: Any, folder: Path, problems: list[str]) -> Path:
    if not isinstance(value, str) or not value:
        problems.append(f"output: {value!r} is not the name of a folder")
        return folder
    return folder / value


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
