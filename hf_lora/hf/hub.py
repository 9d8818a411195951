"""The Hub: finding an adapter folder by path or repo id, and pushing one in a single commit.

Nothing here talks to the network unless the source is no folder and has the form of a repo id, or
the user calls push.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from hf_lora.errors import AdapterFileError, HfLoRAWarning, HubError
from hf_lora.files.content import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.read import is_adapter_folder
from hf_lora.hf.card import Training, adapter_card
from hf_lora.hf.saving import base_name, save_state
from hf_lora.model.registry import wrapped

CARD_FILE = "README.md"


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return a local folder that holds the adapter ``source``: itself, or its files from the Hub.

    Only the two files of the adapter are fetched; what the cache has is not fetched again.

    Raises:
        AdapterFileError: Neither a folder nor a repo id, or no adapter in it.
        HubError: The Hub refused or could not be reached.
    """
    check_subfolder(subfolder)
    folder = Path(source)
    if folder.exists() or isinstance(source, os.PathLike):
        return folder / subfolder if subfolder else folder
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise AdapterFileError(f"{source!r} is neither a folder nor a repo id on the Hub") from None
    paths = [
        _fetch(source, name, revision, subfolder, token) for name in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    return Path(paths[0]).parent


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
    base = base_name(inner)
    if base is not None and os.path.isdir(base):
        warnings.warn(
            f"The base model was loaded from the folder {base!r}, which nobody else has; the pushed "
            "adapter names no base. Set model.config._name_or_path to its Hub id to name it.",
            HfLoRAWarning,
            stacklevel=3,
        )
        base = None
    names = list(registry.adapters) if adapter is None else [registry.adapter(adapter).name]
    with tempfile.TemporaryDirectory() as directory:
        save_state(inner, directory, adapter=adapter, dtype=dtype, base=base)
        training = Training(extra={"tags": list(tags)})
        card = adapter_card(inner, registry, names, base=base, repo_id=repo_id, training=training)
        Path(directory, CARD_FILE).write_text(card, encoding="utf-8")
        return push_folder(
            Path(directory),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message or f"Upload {', '.join(names)} with hf_lora",
            commit_description=commit_description,
        )


def push_folder(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str,
    commit_description: str | None = None,
) -> str:
    """Upload a folder in one commit, making the repo if there is none.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: The Hub refused, or went away; nothing or everything has been committed.
    """
    api = HfApi(token=token)
    with _translated(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def pull(
    repo_id: str,
    directory: Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Copy an adapter's files from the Hub into ``directory``.

    Raises:
        AdapterFileError, HubError: As for :func:`locate`.
    """
    found = locate(repo_id, revision=revision, subfolder=subfolder, token=token)
    directory.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (found / name).is_file():
            shutil.copyfile(found / name, directory / name)
    if not is_adapter_folder(directory):
        raise AdapterFileError(f"{repo_id} holds no {WEIGHTS_FILE}")
    return directory


def check_subfolder(subfolder: str | None) -> None:
    """Raise AdapterFileError if a sub-folder's name leads out of the folder it is in."""
    if subfolder is None:
        return
    parts = Path(subfolder).parts
    if Path(subfolder).is_absolute() or ".." in parts or not parts or "\0" in subfolder:
        raise AdapterFileError(f"The subfolder {subfolder!r} is not a folder inside the adapter's")


def _fetch(
    repo_id: str, name: str, revision: str | None, subfolder: str | None, token: str | bool | None
) -> str:
    with _translated(repo_id):
        try:
            return hf_hub_download(
                repo_id, name, revision=revision, subfolder=subfolder, token=token
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            where = f"{repo_id}/{subfolder}" if subfolder else repo_id
            raise AdapterFileError(
                f"{where} has no {name}, so it is no adapter that hf_lora can read"
            ) from error


@contextmanager
def _translated(repo_id: str) -> Iterator[None]:
    """Turn the client's errors into one of ours that says what to do."""
    try:
        yield
    except AdapterFileError:
        raise
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: ask for access on its page, then log in with `hf auth login` "
            "or pass token=..."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such revision: {_first_line(error)}") from error
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no repo id: {_first_line(error)}") from error
    except (RepositoryNotFoundError, LocalTokenNotFoundError) as error:
        raise HubError(
            f"{repo_id} does not exist, or is private and your token does not open it: log in with "
            "`hf auth login` or pass token=..."
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(
            f"{repo_id} is not in the cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise HubError(
                f"Your token may not do this on {repo_id} (HTTP {status}); log in with "
                "`hf auth login` or pass a token= that may write"
            ) from error
        raise HubError(f"The Hub refused: {_first_line(error)}") from error
    except (OSError, httpx2.HTTPError) as error:
        raise HubError(
            f"The Hub could not be reached, or went away: {_first_line(error)}. If the server has "
            "no Xet storage, set HF_HUB_DISABLE_XET=1 before Python starts."
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
