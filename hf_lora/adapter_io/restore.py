"""Giving a wrapped model the adapters of a checkpoint that was saved from it."""

import os
from pathlib import Path

from torch import nn

from hf_lora.adapter_io.load import restore
from hf_lora.adapter_io.owner import settled
from hf_lora.adapter_io.save import adapter_folder
from hf_lora.errors import AdapterMismatchError
from hf_lora.files.read import is_adapter_folder
from hf_lora.model.registry import Registry, wrapped


def restore_checkpoint(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Give a wrapped model the adapters of a checkpoint that was saved from it.

    Raises:
        AdapterFileError: Unsound, or of other layers, ranks or strengths.
        AdapterMismatchError: The checkpoint holds other adapters than the model has.
        StateError: The model is merged, or an optimizer of DeepSpeed's has copies of the adapters.

    The model is as it was after any of these.
    """
    inner, registry = settled(model) or wrapped(model)
    registry.check_unmerged("load a checkpoint")
    restore(inner, registry, adapters_of_checkpoint(registry, checkpoint))


def adapters_of_checkpoint(
    registry: Registry, checkpoint: str | os.PathLike[str]
) -> dict[str, Path]:
    """Return the folder of each adapter that the model has.

    Raises:
        AdapterMismatchError: The checkpoint holds others, or fewer, or more.
    """
    directory = Path(checkpoint)
    if not os.path.isdir(directory):
        raise AdapterMismatchError(f"{directory} is not a folder, so it is no checkpoint.")
    there = adapters_in(directory)
    here = {name: adapter_folder(directory, name) for name in registry.adapters}
    if there != set(here.values()):
        found = ", ".join(sorted(_shown(directory, folder) for folder in there)) or "no adapter"
        raise AdapterMismatchError(
            f"The checkpoint {directory} holds {found}, and this model has "
            f"{', '.join(registry.adapters)}; wrap the model as it was when the checkpoint was "
            "saved."
        )
    return here


def adapters_in(checkpoint: Path) -> set[Path]:
    """Return the adapter folders of a checkpoint: itself, and those right below it."""
    inside = {folder for folder in checkpoint.iterdir() if folder.is_dir()}
    return {folder for folder in {checkpoint, *inside} if is_adapter_folder(folder)}


def _shown(checkpoint: Path, folder: Path) -> str:
    return "default" if folder == checkpoint else folder.name
