"""Pushing adapters, or a folder with one, to the Hub in a single commit."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
)
from torch import nn

from hf_lora.adapter_io.save import as_dtype, base_name, save_state
from hf_lora.errors import ConfigError, HfLoRAWarning, HubError
from hf_lora.files.atomic import temporary_folder
from hf_lora.files.data import WEIGHTS_FILE
from hf_lora.files.other_kind import full_model_in
from hf_lora.hub.base_model import base_license, hub_base
from hf_lora.hub.card.card import CARD_FILE, LIBRARY, Training, adapter_card, is_untouched
from hf_lora.hub.errors import expected, file_names, writing
from hf_lora.layers.names import DEFAULT, is_adapter_name
from hf_lora.model.registry import Registry, wrapped
from hf_lora.version import __version__

_CHECKPOINT = re.compile(r"checkpoint-\d+|last-checkpoint")
"""What Trainer calls its checkpoints in a repo."""


def push(
    model: nn.Module,
    repo_id: str,
    *,
    adapter: str | None = None,
    private: bool | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Push adapters and a model card in one commit; see :func:`hf_lora.push_to_hub`."""
    inner, registry = wrapped(model)
    base = hub_base(base_name(inner))
    names = list(registry.adapters) if adapter is None else [registry.adapter(adapter).name]
    with temporary_folder(f"What is to be pushed to {repo_id} could not be written") as directory:
        # one process may push alone, so nothing here waits for the others
        save_state(inner, directory, adapter=adapter, dtype=dtype, base=base, together=False)
        with writing(repo_id, create_pr):
            repo = _open(repo_id, private, revision, create_pr, token)
        licence = base_license(base, token) if base else {}
        there = repo.adapters()
        described = [name for name in registry.adapters if name in {*names, *there}]
        card = adapter_card(
            inner,
            registry,
            described,
            base=base,
            repo_id=repo.id,
            training=_told(registry, described, {**licence, "tags": list(tags)}),
            dtype=as_dtype(dtype),
            others=[name for name in there if name not in described],
        )
        (directory / CARD_FILE).write_text(card, encoding="utf-8")
        message = commit_message or f"Upload {', '.join(names)} with hf_lora"
        with writing(repo_id, create_pr):
            return _commit(repo, directory, message, commit_description)


def _told(registry: Registry, names: Sequence[str], given: Mapping[str, Any]) -> Training:
    """Return what is known of the training, if all these adapters were trained in the same run."""
    runs = [registry.adapter(name).training for name in names]
    if runs[0] is None or any(run is not runs[0] for run in runs):
        return Training(extra=given)
    return runs[0].told(given)


def push_folder(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str,
    card: Callable[[str], str] | None = None,
) -> str:
    """Upload everything in a folder in one commit, making the repo if there is none.

    A folder without a card gets what ``card`` makes of the repo's id, whose owner need not have
    been said.

    If everything is there already there is no commit. A card that hf_lora wrote does not replace
    one on the Hub that somebody else wrote or has edited, which is told with a warning.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ConfigError: A pull request against a revision.
        HubError: The Hub refused, or went away; nothing or everything has been committed.
    """
    with writing(repo_id, create_pr):
        repo = _open(repo_id, private, revision, create_pr, token)
    if card is not None and not (directory / CARD_FILE).exists():
        (directory / CARD_FILE).write_text(card(repo.id), encoding="utf-8")
    with writing(repo_id, create_pr):
        return _commit(repo, directory, commit_message, None)


@dataclasses.dataclass(frozen=True)
class _Repo:
    """A repo that exists, and what will be committed to."""

    api: HfApi
    id: str
    revision: str | None
    create_pr: bool
    files: tuple[str, ...]

    def adapters(self) -> list[str]:
        """Return the names of the adapters in it."""
        folders = [PurePosixPath(f).parent for f in self.files if f.endswith(f"/{WEIGHTS_FILE}")]
        named = [folder.name for folder in folders if len(folder.parts) == 1]
        own = [DEFAULT] if WEIGHTS_FILE in self.files else []
        # a name that no adapter can have was not made by us, and might lead elsewhere
        return own + [
            name for name in named if is_adapter_name(name) and not _CHECKPOINT.fullmatch(name)
        ]


def _open(
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | bool | None,
) -> _Repo:
    """Make the repo and the branch if there are none."""
    if create_pr and revision not in (None, "main"):
        raise ConfigError(
            f"create_pr=True opens a pull request against main, and revision={revision!r} names "
            "another branch; give one of the two."
        )
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    made = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = expected(str, made.repo_id, "the repo's name")
    if private and not api.repo_info(repo_id).private:
        raise HubError(
            f"{repo_id} exists and is public, and private=True cannot change that. Nothing was "
            "pushed: push without it, or make the repo private in its settings first."
        )
    # refs/pr/3 is a pull request: it is there or it is not
    branch = revision if revision is not None and not revision.startswith("refs/") else None
    if branch is not None and not api.revision_exists(repo_id, branch):
        api.create_branch(repo_id, branch=branch)
    files = file_names(api.list_repo_files(repo_id, revision=revision))
    return _Repo(api, repo_id, revision, create_pr, tuple(files))


def _commit(repo: _Repo, directory: Path, message: str, description: str | None) -> str:
    """Commit what is in the folder, at once: the client's own upload of folders may split it."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    model = full_model_in(repo.files)
    if model is not None and directory / WEIGHTS_FILE in paths:
        raise HubError(
            f"{repo.id} holds a full model ({model}). With an adapter beside it transformers "
            "would open the repo as that model plus the adapter. Push to another repo; nothing was "
            "pushed."
        )
    card = directory / CARD_FILE
    if card in paths and _untouched(card) and _has_edited_card(repo):
        paths.remove(card)
    commit = repo.api.create_commit(
        repo.id,
        [CommitOperationAdd(path.relative_to(directory).as_posix(), path) for path in paths],
        commit_message=message,
        commit_description=description,
        revision=repo.revision,
        create_pr=repo.create_pr,
    )
    return expected(str, commit.pr_url or commit.commit_url, "the commit's address")


def _has_edited_card(repo: _Repo) -> bool:
    """Say, and warn, whether the repo has a card that is not as hf_lora wrote it."""
    if CARD_FILE not in repo.files:
        return False
    if _untouched(Path(repo.api.hf_hub_download(repo.id, CARD_FILE, revision=repo.revision))):
        return False
    warnings.warn(
        f"The model card of {repo.id} was not written by hf_lora, or was edited since, and is left "
        "as it is. Delete its README.md to have a new one pushed.",
        HfLoRAWarning,
        stacklevel=5,
    )
    return True


def _untouched(card: Path) -> bool:
    return is_untouched(card.read_text(encoding="utf-8", errors="replace"))
