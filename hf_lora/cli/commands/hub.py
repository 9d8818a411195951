"""``hf-lora push`` and ``hf-lora pull``: adapter folders to the Hub and back."""

from pathlib import Path

from hf_lora.cli.output import Result, tell
from hf_lora.errors import AdapterFileError
from hf_lora.files.read import is_adapter_folder, read_folder
from hf_lora.hub.download import pull as copy_from_hub
from hf_lora.hub.push_folder import push_adapter_folder
from hf_lora.recipes.record import known_training


def push(
    folder: Path,
    repo_id: str,
    *,
    base: str | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
) -> Result:
    """Push an adapter folder in one commit.

    Raises:
        AdapterFileError: There is no sound adapter in the folder.
        HubError: The Hub refused or went away.
    """
    pushed = push_adapter_folder(
        folder,
        repo_id,
        base=base,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        training=known_training(folder),
    )
    if pushed.left_out:
        tell(f"left out, as no part of an adapter: {', '.join(pushed.left_out)}")
    data = {"url": pushed.url, "repo_id": repo_id, "base": pushed.base, "files": pushed.files}
    return Result(data=data, text=f"pushed {', '.join(pushed.files)}: {pushed.url}")


def pull(
    repo_id: str, folder: Path, *, revision: str | None, subfolder: str | None, force: bool
) -> Result:
    """Copy an adapter from the Hub into a folder, and check it.

    Raises:
        AdapterFileError: It is not sound, or the folder holds another one already.
        HubError: The Hub refused or could not be reached.
    """
    if is_adapter_folder(folder) and not force:
        raise AdapterFileError(f"{folder} holds an adapter already; --force replaces it")
    copy_from_hub(repo_id, folder, revision=revision, subfolder=subfolder)
    found = read_folder(folder)
    data = {"folder": str(folder), "base": found.base, "layers": len(found.slots)}
    words = f"{len(found.slots)} layers, for {found.base or 'a base that it does not name'}"
    return Result(data=data, text=f"{folder}: {words}")
