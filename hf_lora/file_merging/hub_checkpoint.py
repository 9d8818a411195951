"""A model's checkpoint on the Hub: looked at from afar, and fetched file by file."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import SafetensorsParsingError

from hf_lora.errors import BaseLoadError
from hf_lora.file_merging.checkpoint import INDEX, SINGLE, Checkpoint, Table, as_base_error
from hf_lora.file_merging.side_files import WEIGHTS
from hf_lora.files.safe_json import read_json
from hf_lora.files.safetensors_io import TensorFile, dtype_called
from hf_lora.hub.errors import reading


class HubCheckpoint(Checkpoint):
    """A checkpoint of which a file is fetched when it is needed.

    What a file holds is read from its first bytes, so that everything is planned and checked before
    the first of them comes. Files that the cache has are not fetched.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        keep: bool = True,
    ):
        """Fetch everything but the tensors.

        Args:
            repo_id: ``user/name``.
            revision: Branch, tag or commit.
            token: For private repos.
            keep: Whether files that are fetched stay in the cache; if not, each is deleted when its
                part of the output is written.

        Raises:
            HubError: The Hub refused or could not be reached.
            BaseLoadError: It is no sound checkpoint.
        """
        self.repo_id = repo_id
        self._token = token
        self._keep = keep
        self._fetched: set[str] = set()
        self._in_use: Counter[str] = Counter()
        with reading(repo_id, revision):
            found = snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                ignore_patterns=[f"*{ending}" for ending in WEIGHTS],
            )
        self._commit = Path(found).name
        super().__init__(Path(found))

    @property
    def name(self) -> str:
        """What it is called, for people."""
        return self.repo_id

    @property
    def commit(self) -> str | None:
        """Which commit it is."""
        return self._commit

    @property
    def at_hand(self) -> frozenset[str]:
        """Which of its files the cache has."""
        return frozenset(name for name in self.tables if self._cached(name) is not None)

    @contextlib.contextmanager
    def opened(self, shard: str) -> Iterator[TensorFile]:
        """Fetch a file, unless it is here, and have it for as long as a block lasts."""
        try:
            with as_base_error(self.name):
                file = self._file(shard)
            if Table.of(file) != self.stored[shard]:
                raise BaseLoadError(f"{shard} of {self.name} is not what its first bytes said")
            self._in_use[shard] += 1
            try:
                yield file
            finally:
                self._in_use[shard] -= 1
        finally:
            path = None if self._in_use[shard] else self._cached(shard)
            if path is not None and shard in self._fetched and not self._keep:
                content = path.resolve()
                path.unlink(missing_ok=True)
                content.unlink(missing_ok=True)

    def identity(self) -> dict[str, Any]:
        """Return what tells it from another."""
        return {"repo": self.repo_id, "commit": self._commit}

    def _listing(self) -> set[str]:
        files = set(os.listdir(self.directory))
        if INDEX not in files:
            return files | {SINGLE}
        mapped = read_json(self.directory / INDEX).get("weight_map")
        shards = mapped.values() if isinstance(mapped, dict) else ()
        return files | {name for name in shards if isinstance(name, str)}

    def _table(self, shard: str) -> Table:
        path = self._cached(shard)
        if path is not None:
            return Table.of(TensorFile(path))
        api = HfApi(token=self._token)
        with reading(self.repo_id, self._commit):
            try:
                found = api.parse_safetensors_file_metadata(
                    self.repo_id, shard, revision=self._commit
                )
            except SafetensorsParsingError as error:
                raise BaseLoadError(f"{shard} of {self.name} is damaged: {error}") from error
        tensors = sorted(found.tensors.items(), key=lambda item: item[1].data_offsets)
        return Table(
            {name: tuple(info.shape) for name, info in tensors},
            {name: dtype_called(info.dtype, shard) for name, info in tensors},
        )

    def _file(self, shard: str) -> TensorFile:
        path = self._cached(shard)
        if path is None:
            self._fetched.add(shard)
            with reading(self.repo_id, self._commit):
                name = hf_hub_download(
                    self.repo_id, shard, revision=self._commit, token=self._token
                )
            path = Path(name)
        return TensorFile(path)

    def _cached(self, shard: str) -> Path | None:
        found = try_to_load_from_cache(self.repo_id, shard, revision=self._commit)
        return Path(found) if isinstance(found, str) and os.path.isfile(found) else None
