"""A folder that is there at once and whole, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_lora.errors import SaveError
from hf_lora.files.atomic import alone_in, made_folder, refused_as_save_error, sync_directory


def check_free(output: Path, what: str) -> None:
    """Raise SaveError unless nothing is at a path, or an empty folder.

    Args:
        output: The path.
        what: What goes there, for the message: ``"a merged checkpoint"``.
    """
    if not os.path.lexists(output):
        return
    if not output.is_dir() or output.is_symlink():
        raise SaveError(f"{output} is no folder; {what} is one. Nothing was written.")
    if any(output.iterdir()):
        raise SaveError(
            f"{output} is not empty; name a folder that is not there yet. Nothing was written."
        )


@contextlib.contextmanager
def new_folder(output: Path, what: str) -> Iterator[Path]:
    """Hand out a hidden folder beside ``output``, which has its name after the block.

    After an error nothing is left of it. What a killed process left there is taken away first.

    Args:
        output: A folder that is not there yet, or is empty.
        what: What goes there, for messages.

    Raises:
        SaveError: Something is there already, or the disk refuses.
    """
    check_free(output, what)
    work = output.parent / f".{output.name}.new"
    with refused_as_save_error(f"{output} could not be written"), made_folder(output.parent):
        work.mkdir(exist_ok=True)
        try:
            with alone_in(work):
                check_free(output, what)  # another process may have been at it
                for name in os.listdir(work):
                    _remove(work / name)
                yield work
                for path in work.iterdir():
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
                sync_directory(work)
                if output.is_dir():
                    output.rmdir()
                os.replace(work, output)
                sync_directory(output.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
