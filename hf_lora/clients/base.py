"""What a client has to know of an adapter's base: its configuration, without its weights."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_lora.errors import AdapterFileError, BaseLoadError, HubError
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
        HubError: The Hub was asked for what was given, and refused or could not be reached.
    """
    if base is not None:
        return _given(base, adapter)
    with contextlib.suppress(HubError, BaseLoadError, HFValidationError):
        return _named(adapter, fetch=fetch)
    return None


def _given(base: str | os.PathLike[str], adapter: AdapterFolder) -> BaseConfig:
    if isinstance(base, os.PathLike) or os.path.exists(base):
        folder = Path(base)
        if not any((folder / name).is_file() for name in (CONFIG, PIPELINE)):
            raise BaseLoadError(f"The base {base} has no {CONFIG}: it is no model's folder")
        return _read(folder, str(base))
    return _asked(base, adapter)


def _named(adapter: AdapterFolder, *, fetch: bool) -> BaseConfig | None:
    """Return the configuration of what an adapter names as its base, as far as it is there."""
    named = adapter.base
    if named is None:
        return None
    if os.path.exists(named):
        return _given(Path(named), adapter)
    if fetch:
        return _asked(named, adapter)
    found = try_to_load_from_cache(named, CONFIG, revision=adapter.revision)
    return _read(Path(found).parent, named) if isinstance(found, str) else None


def _asked(repo_id: str, adapter: AdapterFolder) -> BaseConfig:
    """Return the configuration of a base on the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise BaseLoadError(f"{repo_id!r} is neither a folder nor an id on the Hub") from None
    revision = adapter.revision if repo_id == adapter.base else None
    with reading(repo_id, revision):
        return _read(Path(_fetched(repo_id, revision)).parent, repo_id)


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
        # without the second argument it asks the terminal whether to run a stranger's code
        full = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseLoadError(f"The base {name} cannot be read: {error}") from error
    return BaseConfig(name, {**fields, **full})
