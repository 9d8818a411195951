"""Pushing a saved adapter folder: adapters, a card, and nothing that lies there by chance."""

import dataclasses
import fnmatch
import json
import os
import re
import shutil
import warnings
from pathlib import Path

from hf_lora.adapter_io.save import adapter_folder
from hf_lora.errors import AdapterFileError, HfLoRAWarning
from hf_lora.files.atomic import temporary_folder
from hf_lora.files.read import is_adapter_folder, read_folder
from hf_lora.files.rename_base import copy_with_base
from hf_lora.files.set_note import mixture
from hf_lora.hub.base_model import base_license, hub_id
from hf_lora.hub.card.card import CARD_FILE, folder_card
from hf_lora.hub.card.facts import Training
from hf_lora.hub.upload import push_folder
from hf_lora.layers.names import DEFAULT

_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt", "LICENSE*", "NOTICE*", "*.png",
)  # fmt: skip
"""What belongs to an adapter although it is no adapter; everything else stays at home."""

_PICTURE = "loss.png"
_CHECKPOINT = re.compile(r"checkpoint-\d+|last-checkpoint")


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What was pushed."""

    url: str
    """Address of the commit, or of the pull request."""

    base: str | None
    """The base model that the pushed adapter names."""

    files: tuple[str, ...]
    left_out: tuple[str, ...]
    """What the folder holds besides and was not pushed."""


def push_adapter_folder(
    directory: Path,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    training: Training | None = None,
) -> Pushed:
    """Push a folder that :func:`hf_lora.save` or PEFT wrote, in one commit.

    Pushed are the adapters (the folder's own and those in folders of their names), the card, and
    tokenizer and licence files; checkpoints and the rest are not. A folder without a card gets one.
    A base model that is a path on this machine is not named, with a warning.

    Args:
        directory: The adapter folder; it is not changed.
        repo_id: ``user/name``; the repo is made if there is none.
        base: Hub id of the base model to name, instead of what the files say.
        private, revision, create_pr, token, commit_message: As for :func:`hf_lora.push_to_hub`.
        training: What is known of the training, for the card.

    Raises:
        AdapterFileError: There is no sound adapter in the folder.
        HubError: The Hub refused or went away; nothing has been committed.
    """
    adapters = {name: read_folder(folder) for name, folder in _folders(directory).items()}
    for line in dict.fromkeys(filter(None, map(mixture, (a.directory for a in adapters.values())))):
        warnings.warn(line, HfLoRAWarning, stacklevel=2)
    named = base or _nameable(next(iter(adapters.values())).base, directory)
    with temporary_folder(f"What is to be pushed to {repo_id} could not be written") as root:
        for name, adapter in adapters.items():
            copy_with_base(adapter, adapter_folder(root, name), named)
        beside = [entry for entry in directory.iterdir() if entry.is_file() and _belongs(entry)]
        for entry in beside:
            shutil.copyfile(entry, root / entry.name)
        known = training or Training()
        known = dataclasses.replace(
            known,
            extra={**(base_license(named, token) if named else {}), **known.extra},
            processor=any(entry.name.startswith("tokenizer") for entry in beside),
            chat=_has_chat_template(root),
            picture=_PICTURE if (root / _PICTURE).is_file() else None,
        )
        url = push_folder(
            root,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message or f"Upload {', '.join(adapters)} with hf_lora",
            card=lambda name: folder_card(adapters, name, base=named, training=known),
        )
        files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    taken = {*(Path(file).parts[0] for file in files)}
    left_out = sorted(entry.name for entry in directory.iterdir() if entry.name not in taken)
    return Pushed(url, named, tuple(files), tuple(left_out))


def _has_chat_template(folder: Path) -> bool:
    """Say whether the tokenizer in a folder has one: in a file of its own, or in its settings."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _folders(directory: Path) -> dict[str, Path]:
    """Return the adapter folders in ``directory`` by name: its own, and those of other names."""
    found = {DEFAULT: directory} if is_adapter_folder(directory) else {}
    if os.path.isdir(directory):
        for entry in sorted(directory.iterdir()):
            if is_adapter_folder(entry) and not _CHECKPOINT.fullmatch(entry.name):
                found[entry.name] = entry
    if not found:
        read_folder(directory)  # says what is there instead
        raise AdapterFileError(f"{directory} holds no adapter")
    return found


def _nameable(base: str | None, directory: Path) -> str | None:
    """Return the base model's name if others can use it."""
    named = hub_id(base)
    if base is not None and named is None:
        warnings.warn(
            f"{directory} names the folder {base!r} as its base model, which nobody else has; "
            "what is pushed names no base. Give the Hub id of the base to name it.",
            HfLoRAWarning,
            stacklevel=3,
        )
    return named


def _belongs(entry: Path) -> bool:
    patterns = (CARD_FILE, *_BESIDE)
    return any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
