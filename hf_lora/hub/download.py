"""Finding an adapter folder by path or repo id, and copying one from the Hub.

Nothing here talks to the network unless the source is no folder and has the form of a repo id.
"""

import os
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_lora.errors import AdapterFileError
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.foreign import FOREIGN_FILES, find_foreign
from hf_lora.files.read import is_own, read_folder
from hf_lora.files.write import copy_folder
from hf_lora.hub.errors import asked, file_names, reading, what_is_there


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return a local folder that holds the adapter ``source``: itself, or its files from the Hub.

    A folder that exists is taken as it is and a path object is never a repo id: neither touches the
    network. Of a repo only the two files of the adapter are fetched, both of one commit; what the
    cache has is not fetched again. As in a folder, weights that hf_lora wrote do without the other.

    Raises:
        AdapterFileError: Neither a folder nor a repo id, or no adapter in it.
        HubError: The Hub refused or could not be reached.
    """
    check_subfolder(subfolder)
    folder = Path(source)
    if isinstance(source, os.PathLike) or os.path.exists(folder):
        return folder / subfolder if subfolder else folder
    return _fetch(source, revision=revision, subfolder=subfolder, token=token)


def pull(
    repo_id: str,
    directory: Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Copy an adapter from the Hub into ``directory``, replacing one that is there.

    The files are checked before anything is replaced, and replaced as :func:`hf_lora.save` does.

    Raises:
        AdapterFileError, HubError: As for :func:`locate`, or the adapter is not sound.
        SaveError: The folder cannot be written; it holds the old adapter or the new one.
    """
    check_subfolder(subfolder)
    found = _fetch(repo_id, revision=revision, subfolder=subfolder, token=token)
    read_folder(found)
    if find_foreign(found) is not None:
        raise AdapterFileError(
            f"{repo_id} holds an adapter in another format than PEFT's; "
            'hf_lora.export(repo_id, output, "peft") writes it in that one'
        )
    copy_folder(found, directory)
    return directory


def check_subfolder(subfolder: str | None) -> None:
    """Raise AdapterFileError if a sub-folder's name leads out of the folder it is in."""
    if subfolder is None:
        return
    parts = Path(subfolder).parts
    if Path(subfolder).is_absolute() or ".." in parts or not parts or "\0" in subfolder:
        raise AdapterFileError(f"The subfolder {subfolder!r} is not a folder inside the adapter's")


def _fetch(
    repo_id: str, *, revision: str | None, subfolder: str | None, token: str | bool | None
) -> Path:
    """Return the cache's folder with an adapter's files, of one commit."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise AdapterFileError(
            f"{repo_id!r} is neither a folder nor a repo id on the Hub"
        ) from None
    inside = PurePosixPath(Path(subfolder or "").as_posix())
    with reading(repo_id, revision):
        config = _download(repo_id, inside / CONFIG_FILE, revision, token)
        at = config.parents[len(inside.parts)].name if isinstance(config, Path) else revision
        weights = _download(repo_id, inside / WEIGHTS_FILE, at, token)
        # the header of weights that hf_lora wrote has the whole configuration
        if isinstance(weights, Path) and (isinstance(config, Path) or is_own(weights)):
            return weights.parent
        foreign = _foreign(repo_id, inside, at, token)
        if foreign is not None:
            return foreign
        found = {CONFIG_FILE: config, WEIGHTS_FILE: weights}
        errors = ((name, e) for name, e in found.items() if isinstance(e, EntryNotFoundError))
        name, error = next(errors)
        words = what_is_there(repo_id, subfolder, name, _files(repo_id, at, token))
        raise AdapterFileError(words) from error


def _foreign(
    repo_id: str, inside: PurePosixPath, revision: str | None, token: str | bool | None
) -> Path | None:
    """Return the cache's folder with an adapter in another format, if there is one.

    The last part of ``inside`` may be the component that is meant.
    """
    for folder in dict.fromkeys((inside, inside.parent)):
        for name in FOREIGN_FILES:
            try:
                weights = _download(repo_id, folder / name, revision, token)
            except LocalEntryNotFoundError:
                return None
            if isinstance(weights, Path):
                return weights.parent if folder == inside else weights.parent / inside.name
    return None


def _download(
    repo_id: str, path: PurePosixPath, revision: str | None, token: str | bool | None
) -> Path | EntryNotFoundError:
    """Return a file in the cache, or what the client says of one that the repo does not have."""
    file = path.as_posix()
    try:
        return Path(hf_hub_download(repo_id, file, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        # the Hub cannot be asked, but the cache remembers what it did not have
        if try_to_load_from_cache(repo_id, file, revision=revision) is not _CACHED_NO_EXIST:
            raise
        return error
    except EntryNotFoundError as error:
        return error


def _files(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    """Return what a repo holds, for an error message only: nothing, if that cannot be said."""
    api = HfApi(token=token)
    return asked(lambda: file_names(api.list_repo_files(repo_id, revision=revision)), [])
