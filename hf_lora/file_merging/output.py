"""The folder of a merged checkpoint: there at once and whole, or not at all; and taken up again.

Everything is written into a hidden folder beside it, each file under a name of its own until it is
whole, the configuration last. When all is there the folder gets its name, by one rename.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_lora.errors import AdapterFileError, SaveError, listing
from hf_lora.file_merging.measure import Sums
from hf_lora.files.atomic import (
    alone_in,
    made_folder,
    refused_as_save_error,
    staged,
    sync_directory,
)
from hf_lora.files.new_folder import check_free
from hf_lora.files.safe_json import read_json

NOTE = "hf_lora_merge.json"
WHAT = "a merged checkpoint"
"""What is built here, for messages."""

_PART = ".part"


class Unfinished:
    """A merged checkpoint in the making."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], done: dict[str, dict[str, Sums]]):
        self.folder = folder
        self.done = done
        """Name of each file that is whole to what was measured while it was written."""

        self._identity = dict(identity)

    def begin(self, shard: str) -> Path:
        """Return the name under which one of its files is written."""
        part = self.folder / f"{shard}{_PART}"
        part.unlink(missing_ok=True)
        return part

    def finish(self, shard: str, measured: dict[str, Sums]) -> None:
        """Give a file that is whole, and on the disk, its name, and note what was measured."""
        os.replace(self.folder / f"{shard}{_PART}", self.folder / shard)
        self.done[shard] = measured
        self._note()

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, at once."""
        path = self.folder / name
        with staged(path, lambda file: file.write(content)) as temporary:
            os.replace(temporary, path)

    def _note(self) -> None:
        shards = {
            shard: {name: sums.as_data() for name, sums in found.items()}
            for shard, found in self.done.items()
        }
        self.write(NOTE, json.dumps({**self._identity, "shards": shards}).encode())


@contextlib.contextmanager
def building(output: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Unfinished]:
    """Hand out a folder to write into, which is ``output`` after the block.

    After an error it is kept under its hidden name, to be taken up again with ``resume``.

    Args:
        output: A folder that is not there yet, or is empty.
        identity: What is merged; plain data.
        resume: Whether to go on with what an earlier try has left.

    Raises:
        SaveError: Something is there already, the disk refuses, or what was left is of another
            merge.
    """
    check_free(output, WHAT)
    work = output.parent / f".{output.name}.merging"
    with (
        refused_as_save_error(f"{output} could not be written"),
        made_folder(output.parent),
    ):
        work.mkdir(exist_ok=True)
        with alone_in(work):
            check_free(output, WHAT)  # another process may have been at it
            done = _left(work, identity) if resume else {}
            if not done:
                _clear(work)
            yield Unfinished(work, identity, done)
            sync_directory(work)
            if output.is_dir():
                output.rmdir()
            os.replace(work, output)
            sync_directory(output.parent)


def _left(work: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Sums]]:
    """Return what an earlier try has finished.

    Raises:
        SaveError: It was another merge.
    """
    if not (work / NOTE).is_file():
        return {}
    try:
        found = read_json(work / NOTE)
        then = {key: found.get(key) for key in identity}
        differ = [
            f"{key}: {then[key]!r} then, {value!r} now"
            for key, value in identity.items()
            if then[key] != value
        ]
        if not differ:
            return {
                shard: {name: Sums.of(data) for name, data in tensors.items()}
                for shard, tensors in found["shards"].items()
                if (work / shard).is_file()
            }
    except (AdapterFileError, KeyError, TypeError, AttributeError) as error:
        raise SaveError(f"{work / NOTE} is damaged ({error}); merge without resume") from error
    raise SaveError(
        listing(f"{work} is what another merge has left", differ, "Merge without resume.")
    )


def _clear(work: Path) -> None:
    for name in os.listdir(work):
        path = work / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
