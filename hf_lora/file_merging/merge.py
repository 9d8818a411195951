"""``merge_checkpoint``: adapters into a checkpoint on disk, file to file."""

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_lora.adapter_io.base_loading import is_gone
from hf_lora.adapter_io.match import match_folder
from hf_lora.errors import (
    BaseMismatchError,
    ConfigError,
    HfLoRAWarning,
    SaveError,
    TargetError,
    listing,
)
from hf_lora.file_merging.base import CheckpointBase, model_without_data
from hf_lora.file_merging.checkpoint import (
    CONFIG,
    INDEX,
    Checkpoint,
    as_json,
)
from hf_lora.file_merging.hub_checkpoint import HubCheckpoint
from hf_lora.file_merging.measure import DTYPES, Sums, dtype_name, in_all
from hf_lora.file_merging.output import NOTE, WHAT, Unfinished, building
from hf_lora.file_merging.plan import Entry, Plan, make_plan
from hf_lora.file_merging.report import MergedTensor, MergeReport, Verified
from hf_lora.file_merging.shard import MergedRows, is_copied, write_shard
from hf_lora.file_merging.side_files import carried, carry, merged_config, merged_index
from hf_lora.file_merging.updates import Adapter, Updates
from hf_lora.file_merging.verify import verify_shard
from hf_lora.file_merging.workers import Flushing, Workers
from hf_lora.files.commit_note import file_digest
from hf_lora.files.new_folder import check_free
from hf_lora.files.read import AdapterFolder, read_folder
from hf_lora.hub.download import locate
from hf_lora.version import __version__

Source = str | os.PathLike[str]


def merge_checkpoint(
    base: Source | None,
    adapter: Source | Iterable[Source] | Mapping[str, float],
    output: Source,
    *,
    dtype: str | torch.dtype | None = None,
    verify: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    check_base: bool = True,
    revision: str | None = None,
    keep_downloads: bool = True,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge adapters into a checkpoint on disk, tensor by tensor, without loading a model.

    The output is a checkpoint like the base's: the same names, files and types, with its
    configuration, tokenizer and chat template. Only tensors that an adapter changes are computed,
    in groups of rows, added up in float32 (float64 where the output has float32) and rounded once;
    all others are copied by the kernel. Memory does not grow with the model.

    Everything is written into a hidden folder beside ``output``, which gets its name when all of it
    is there: a process killed at any moment leaves nothing that loads.

    Args:
        base: Folder of the base model, or its id on the Hub; None for the one that the adapter
            names.
        adapter: Folder of an adapter or its id on the Hub, or several, or a mapping from each to a
            factor. Several are added up before they are rounded.
        output: A folder that is not there yet.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"`` for all floating-point tensors; by
            default each keeps its own.
        verify: Whether to read a sample of the output again and compare it with float64.
        resume: Whether to go on where an interrupted merge of the same has stopped.
        dry_run: Whether to measure only, on a sample, and write nothing.
        check_base: Whether to compare the base's weights with those that the adapter was trained
            on.
        revision: Branch, tag or commit of the base on the Hub.
        keep_downloads: Whether files of a base on the Hub stay in the cache. They are fetched one
            by one; if not kept, each is deleted when its part of the output is written, unless it
            was there before.
        token: For private repos.
        trust_remote_code: Whether to run code that came with the base, if it has its own classes.

    Returns:
        What was done, and how much of the change the output's type could not hold; above 5 % there
        is a warning.

    Raises:
        AdapterFileError, AdapterMismatchError, BaseMismatchError: As for :func:`hf_lora.load`.
        BaseLoadError: The base is no sound checkpoint of safetensors.
        TargetError: Something cannot be merged into it; all of it is named.
        SaveError: The output is there already, cannot be written, or did not stand the test.
        ConfigError: ``dtype`` or a factor is wrong.
        HubError: The Hub refused or could not be reached.
    """
    wanted, target = _dtype(dtype), Path(output)
    if not dry_run:
        check_free(target, WHAT)
    weights = _weights(adapter)
    folders = {source: read_folder(locate(source, token=token)) for source in weights}
    first = next(iter(folders.values()))
    checkpoint = _checkpoint(base, first, revision=revision, token=token, keep=keep_downloads)
    models = [
        model_without_data(checkpoint, folder, trust_remote_code=trust_remote_code)
        for folder in folders.values()
    ]
    kinds = {type(model).__name__ for model in models}
    if len(kinds) > 1:
        raise TargetError(f"These adapters are for models of different classes: {sorted(kinds)}")
    found = CheckpointBase(max(models, key=_parts), checkpoint)
    merged = [
        Adapter(
            os.fspath(source),
            match_folder(folder, found.model, check_base=check_base, base=found),
            weights[source],
        )
        for source, folder in folders.items()
    ]
    updates = Updates(found, merged)
    plan = make_plan(updates, wanted)
    task = _Merge(checkpoint, updates, plan, wanted)
    if dry_run:
        return _told(task.report(None, task.measured()))
    identity = _identity(checkpoint, updates, wanted)
    _check_room(target, plan)
    with building(target, identity, resume=resume) as unfinished:
        verified = task.write(unfinished, verify=verify)
        sums = {name: s for found in unfinished.done.values() for name, s in found.items()}
        report = task.report(target, sums, verified)
        unfinished.write(NOTE, report.to_json().encode())
        task.write_beside(unfinished)
    return _told(report)


class _Merge:
    """One merge that was planned."""

    def __init__(
        self, checkpoint: Checkpoint, updates: Updates, plan: Plan, dtype: torch.dtype | None
    ):
        self.checkpoint = checkpoint
        self.updates = updates
        self.plan = plan
        self.dtype = dtype

    def write(self, unfinished: Unfinished, *, verify: bool) -> Verified | None:
        """Write all tensors: while one file goes to the disk, the next is computed."""
        verified = None
        with Workers() as workers, Flushing(unfinished.finish) as flushing:
            for shard, entries in self.plan.shards.items():
                done = shard in unfinished.done
                if done and not verify:
                    continue
                path = unfinished.folder / shard if done else unfinished.begin(shard)
                with self.checkpoint.opened(shard) as source:
                    self._check_numbers(shard)
                    measured = None
                    if not done:
                        measured = write_shard(path, entries, source, self.updates, workers)
                    if verify:
                        one = verify_shard(path, entries, source, self.updates)
                        verified = one if verified is None else verified.joined(one)
                if measured is not None:
                    flushing.flush(path, shard, measured)
        return verified

    def write_beside(self, unfinished: Unfinished) -> None:
        """Write everything but the tensors; what makes the folder a model comes last."""
        adapters = self.updates.adapters
        own = adapters[0].match.folder.directory if len(adapters) == 1 else None
        carry(carried(self.checkpoint.directory, own), unfinished.folder)
        where = {e.name: shard for shard, entries in self.plan.shards.items() for e in entries}
        if self.checkpoint.index is not None:
            total = sum(map(_bytes, self._entries()))
            index = merged_index(self.checkpoint.index, where, total)
            unfinished.write(INDEX, as_json(index))
        fresh = any(entry.source is None for entry in self._entries())
        config = merged_config(
            self.checkpoint.config,
            self.updates.base.model,
            untied=self.plan.untied,
            dtype=self.dtype,
            fresh=fresh,
            dequantized=bool(self.checkpoint.packed),
        )
        unfinished.write(CONFIG, as_json(config))

    def measured(self) -> dict[str, Sums]:
        """Measure a few rows of every tensor that changes, and write nothing."""
        found = {}
        for shard, entries in self.plan.shards.items():
            touched = [entry for entry in entries if entry.parts]
            if touched:
                with self.checkpoint.opened(shard) as source, source.open() as file:
                    self._check_numbers(shard)
                    for entry in touched:
                        rows = MergedRows(entry, file.fileno(), source, self.updates)
                        found[entry.name] = rows.measure(0)
        return found

    def report(
        self, output: Path | None, sums: Mapping[str, Sums], verified: Verified | None = None
    ) -> MergeReport:
        """Return what was done."""
        touched = self.plan.touched
        total = in_all(sums[entry.name] for entry in touched)
        bytes_of = {True: 0, False: 0}
        for entry in self._entries():
            bytes_of[is_copied(entry, self.checkpoint)] += _bytes(entry)
        adapters = self.updates.adapters
        return MergeReport(
            directory=None if output is None else str(output),
            base=self.checkpoint.name,
            commit=self.checkpoint.commit,
            weights="dequantized" if self.checkpoint.packed else "original",
            adapters={adapter.name: adapter.weight for adapter in adapters},
            dtype=_most(touched),
            tensors=tuple(_record(entry, sums[entry.name]) for entry in touched),
            copied=bytes_of[True],
            written=bytes_of[False],
            added=self.plan.added,
            untied=tuple(sorted(self.plan.untied)),
            told=(*self._notes(), *(line for each in adapters for line in each.match.told)),
            lost=total.rounded_away(),
            ratio=total.ratio(),
            verified=verified,
        )

    def _notes(self) -> Iterable[str]:
        """Yield into which weights was merged where there is a choice."""
        if self.checkpoint.packed:
            yield (
                f"{self.checkpoint.name} is quantized; the output has the numbers that its "
                f"{len(self.checkpoint.packed)} packed weights stand for, and is not quantized"
            )
            return
        for adapter in self.updates.adapters:
            fingerprint = (adapter.match.folder.header or {}).get("fingerprint")
            if isinstance(fingerprint, dict) and fingerprint.get("quantized") is True:
                yield (
                    f"{adapter.name} was trained on quantized weights, and was merged into those "
                    "that they were made of, which are not quite the same; with the quantized "
                    "checkpoint as base it is merged into what its weights stand for"
                )

    def _entries(self) -> Iterable[Entry]:
        return (entry for entries in self.plan.shards.values() for entry in entries)

    def _check_numbers(self, shard: str) -> None:
        """Compare what has come only now with what the adapters were trained on."""
        found = self.updates.base.number_differences(shard)
        if found:
            raise BaseMismatchError(
                listing(
                    f"The adapters were trained on other weights than {self.checkpoint.name}",
                    found,
                    "Name the right base, or pass check_base=False if you know that this is "
                    "wanted.",
                )
            )


def _record(entry: Entry, sums: Sums) -> MergedTensor:
    kinds = {update.adds for part in entry.parts for update in part.updates}
    change = "both" if len(kinds) > 1 else "added" if True in kinds else "replaced"
    return MergedTensor(
        name=entry.name,
        shape=entry.shape,
        dtype=dtype_name(entry.dtype),
        change=change,
        measured=sums.numbers,
        ratio=sums.ratio(),
        lost=sums.rounded_away(),
    )


def _told(report: MergeReport) -> MergeReport:
    if report.warning is not None:
        warnings.warn(report.warning, HfLoRAWarning, stacklevel=3)
    return report


def _most(touched: Iterable[Entry]) -> str:
    """Return the type of most of the numbers that change."""
    counts: Counter[str] = Counter()
    for entry in touched:
        counts[dtype_name(entry.dtype)] += torch.Size(entry.shape).numel()
    return counts.most_common(1)[0][0] if counts else "none"


def _bytes(entry: Entry) -> int:
    return torch.Size(entry.shape).numel() * entry.dtype.itemsize


def _parts(model: Any) -> int:
    return sum(1 for _ in model.modules())


def _weights(adapter: Any) -> dict[Source, float]:
    """Return each adapter's source with its factor, in order.

    Raises:
        ConfigError: There is none, one is named twice, or a factor is no finite number.
    """
    if isinstance(adapter, (str, os.PathLike)):
        return {adapter: 1.0}
    pairs = list(adapter.items()) if isinstance(adapter, Mapping) else [(a, 1.0) for a in adapter]
    problems = [
        f"{name}: {factor!r} is no finite factor"
        for name, factor in pairs
        if isinstance(factor, bool)
        or not isinstance(factor, (int, float))
        or not abs(factor) < float("inf")
    ]
    found = dict(pairs)
    if not found:
        problems.append("no adapter is named")
    if len(found) != len(pairs):
        problems.append("an adapter is named twice; give it one factor")
    if problems:
        raise ConfigError(listing("These cannot be merged", problems))
    return {name: float(factor) for name, factor in found.items()}


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[name]


def _checkpoint(
    base: Source | None,
    adapter: AdapterFolder,
    *,
    revision: str | None,
    token: str | bool | None,
    keep: bool,
) -> Checkpoint:
    """Return the base: a folder that exists, else a repo on the Hub."""
    found = adapter.base if base is None else base
    if found is None:
        raise ConfigError(
            f"{adapter.directory} names no base model; name it: merge_checkpoint(base, ...)"
        )
    if isinstance(found, os.PathLike) or os.path.exists(found) or is_gone(found):
        return Checkpoint(Path(found))
    if revision is None and found == adapter.base:
        revision = adapter.revision
    return HubCheckpoint(found, revision=revision, token=token, keep=keep)


def _identity(
    checkpoint: Checkpoint, updates: Updates, dtype: torch.dtype | None
) -> dict[str, Any]:
    adapters = [
        [file_digest(adapter.match.folder.file.path), adapter.weight]
        for adapter in updates.adapters
    ]
    return {
        "version": __version__,
        "base": checkpoint.identity(),
        "adapters": adapters,
        "dtype": None if dtype is None else dtype_name(dtype),
    }


def _check_room(output: Path, plan: Plan) -> None:
    above = next(path for path in output.absolute().parents if path.is_dir())
    needed = sum(_bytes(entry) for entries in plan.shards.values() for entry in entries)
    free = shutil.disk_usage(above).free
    if needed > free:
        raise SaveError(
            f"{output} needs {needed} bytes, and {above} has {free} left. Nothing was written."
        )
