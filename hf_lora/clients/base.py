"""What a client has to know of an adapter's base: its configuration, without its weights."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from hf_lora.errors import AdapterFileError, BaseLoadError
from hf_lora.files.read import AdapterFolder
from hf_lora.files.safe_json import read_json
from hf_lora.hub.errors import reading

CONFIG = "config.json"
PIPELINE = "model_index.json"
"""What a pipeline of diffusers has in its folder: the classes of its components."""


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """A base's configuration."""

    name: str
    """Folder or Hub id, for people."""

    fields: dict[str, Any]
    """As its file has them, and what transformers takes where it says nothing."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its class, as far as they are known."""
        named = self.fields.get("architectures") or [self.fields.get("_class_name")]
        return tuple(name for name in named if isinstance(name, str))

    @property
    def text(self) -> dict[str, Any]:
        """The fields of the language model in it."""
        inside = self.fields.get("text_config")
        return inside if isinstance(inside, dict) else self.fields

    @property
    def tied(self) -> bool:
        """Whether its output head shares its weight with its input embeddings."""
        return any(bool(each.get("tie_word_embeddings")) for each in (self.fields, self.text))

    def count(self, name: str) -> int | None:
        """Return a number of something, such as heads; None if it is not said."""
        found = self.text.get(name)
        return found if isinstance(found, int) and found > 0 else None


def read_base(
    base: str | os.PathLike[str] | None, adapter: AdapterFolder, *, fetch: bool
) -> BaseConfig | None:
    """Return the configuration of an adapter's base, or None if it is not to be had.

    Args:
        base: A folder or a Hub id; None for what the adapter names.
        adapter: The adapter.
        fetch: Whether what the adapter names may be asked of the Hub; if not, only what is on this
            machine is looked at. A ``base`` that is given is asked for in any case.

    Raises:
        BaseLoadError: What was given has no configuration, or one that cannot be read.
        HubError: The Hub refused or could not be reached.
    """
    named = adapter.base if base is None else base
    if named is None:
        return None
    if isinstance(named, os.PathLike) or os.path.exists(named):
        folder = Path(named)
        if not (folder / CONFIG).is_file() and not (folder / PIPELINE).is_file():
            if base is None:
                return None
            raise BaseLoadError(f"The base {named} has no {CONFIG}: it is no model's folder")
        return _read(folder, str(named))
    revision = adapter.revision if named == adapter.base else None
    if base is None and not fetch:
        try:
            found = try_to_load_from_cache(named, CONFIG, revision=revision)
        except HFValidationError:
            return None
        return _read(Path(found).parent, named) if isinstance(found, str) else None
    try:
        with reading(named, revision):
            return _read(Path(_fetched(named, revision)).parent, named)
    except HFValidationError:
        if base is None:
            return None
        raise BaseLoadError(f"{named!r} is neither a folder nor an id on the Hub") from None


def _fetched(repo_id: str, revision: str | None) -> str:
    try:
        return hf_hub_download(repo_id, CONFIG, revision=revision)
    except EntryNotFoundError:
        return hf_hub_download(repo_id, PIPELINE, revision=revision)


def _read(folder: Path, name: str) -> BaseConfig:
    """Read a configuration, with transformers' defaults where it is one of transformers'."""
    path = folder / CONFIG if (folder / CONFIG).is_file() else folder / PIPELINE
    try:
        fields = read_json(path)
    except AdapterFileError as error:
        raise BaseLoadError(f"The base {name} cannot be read: {error}") from error
    if not isinstance(fields.get("model_type"), str):
        return BaseConfig(name, fields)
    try:
        full = transformers.AutoConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseLoadError(f"The base {name} cannot be read: {error}") from error
    return BaseConfig(name, {**fields, **full})
