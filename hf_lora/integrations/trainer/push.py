"""Making a Trainer's folders ready for its push: our files in them, and no path of this machine."""

from pathlib import Path

from torch import nn

from hf_lora.adapter_io.save import adapter_folder, base_name
from hf_lora.files.read import is_adapter_folder, read_folder
from hf_lora.files.rename_base import copy_with_base
from hf_lora.files.write import copy_folders
from hf_lora.hub.base_model import hub_id
from hf_lora.model.registry import Registry


def bring_adapters(registry: Registry, checkpoint: Path, output: Path) -> None:
    """Copy a checkpoint's adapters to where Trainer pushes from: without PEFT it leaves them.

    Raises:
        AdapterFileError, SaveError: A file cannot be read or written.
    """
    folders = {adapter_folder(output, n): adapter_folder(checkpoint, n) for n in registry.adapters}
    copy_folders(
        output, {to: source for to, source in folders.items() if is_adapter_folder(source)}
    )


def name_for_others(
    model: nn.Module, registry: Registry, directory: Path, base: str | None
) -> None:
    """Where the base is a folder of this machine, name ``base`` in the adapters in ``directory``.

    Args:
        model: The wrapped model.
        registry: Its registry.
        directory: What is about to be pushed.
        base: Id under which others find the base, or None if they do not.
    """
    own = base_name(model)
    if own is None or hub_id(own) == own:
        return
    for name in registry.adapters:
        folder = adapter_folder(directory, name)
        if is_adapter_folder(folder):
            copy_with_base(read_folder(folder), folder, base)
