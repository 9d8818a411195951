"""Which checkpoints of a training are whole, and what a run that goes on from one will lack."""

import dataclasses
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from hf_lora.adapter_io.collective import from_all
from hf_lora.adapter_io.restore import adapters_in
from hf_lora.errors import AdapterFileError, HfLoRAWarning, listing
from hf_lora.files.data import WEIGHTS_FILE
from hf_lora.files.manifest import has_manifest, manifest_faults, parts_of
from hf_lora.files.safetensors_io import TensorFile

_ZIP = b"PK"
"""How a file begins that ``torch.save`` wrote."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is to be said of one checkpoint."""

    faults: tuple[str, ...] = ()
    """Why it is not whole, a line each."""

    lacks: tuple[str, ...] = ()
    """What it does not have although it is whole, a line each."""

    unfinished: bool = False
    """Whether its save never came to its end, so that nothing was in it yet that is lost now."""


Judge = Callable[[Path], Verdict]


def numbered(directory: Path, pattern: str) -> list[Path]:
    """Return the folders in ``directory`` whose whole name matches, newest first, by number."""
    if not directory.is_dir():
        return []
    found = []
    for entry in directory.iterdir():
        match = re.fullmatch(pattern, entry.name)
        if match and entry.is_dir():
            found.append((int(match[1]), entry))
    return [path for _, path in sorted(found, reverse=True)]


def newest_whole(checkpoints: list[Path], judge: Judge, *, reads: bool) -> Path | None:
    """Return the newest checkpoint that is whole, and warn of those that were passed over.

    None if there is none, but only ones whose save was cut short: the run has saved nothing yet.

    Args:
        checkpoints: Newest first.
        judge: Says what is to be said of one.
        reads: Whether this process looks at its disk; of several processes one on each machine
            should, and all get the same answer.

    Raises:
        AdapterFileError: None is whole; what is wrong with each is told.
    """
    passed, lost = [], False
    for checkpoint in checkpoints:
        verdict = _verdict(checkpoint, judge, reads)
        if not verdict.faults:
            if passed:
                _warn(f"Resuming from {checkpoint}; newer checkpoints are not whole", passed)
            _warn_of(checkpoint, verdict)
            return checkpoint
        lost |= not verdict.unfinished
        passed.append(f"{checkpoint.name}: {'; '.join(verdict.faults)}")
    if not lost:
        directory = checkpoints[0].parent
        _warn(f"Nothing to go on from: no checkpoint in {directory} was saved to its end", passed)
        return None
    raise AdapterFileError(
        listing(
            f"No checkpoint in {checkpoints[0].parent} is whole, so none can be resumed from",
            passed,
            "Begin anew, or go on from an adapter alone, with a new optimizer and schedule: "
            "hf_lora.load(model, checkpoint, trainable=True).",
        )
    )


def check_whole(checkpoint: Path, beside: list[Path], judge: Judge, *, reads: bool) -> None:
    """Raise unless a checkpoint is whole; warn of what it lacks.

    Args:
        checkpoint: The folder.
        beside: Others, newest first, of which a whole one may be named.
        judge, reads: As for :func:`newest_whole`.

    Raises:
        AdapterFileError: It is not.
    """
    verdict = _verdict(checkpoint, judge, reads)
    if not verdict.faults:
        _warn_of(checkpoint, verdict)
        return
    others = (path for path in beside if path != checkpoint)
    whole = next((p for p in others if not _verdict(p, judge, reads).faults), None)
    instead = f"resume from {whole}" if whole else "begin anew"
    raise AdapterFileError(
        listing(
            f"{checkpoint} is not whole, so that a run would not go on from it as it was",
            verdict.faults,
            f"Either {instead}, or go on from its adapter alone, with a new optimizer and "
            f"schedule: hf_lora.load(model, {str(checkpoint)!r}, trainable=True).",
        )
    )


def damage(checkpoint: Path) -> list[str]:
    """Return what can be seen to be wrong with the files of a checkpoint, a line each.

    By its manifest, if it has one; otherwise by the checksums that adapters and torch's files have
    in themselves.
    """
    if has_manifest(checkpoint):
        return manifest_faults(checkpoint)
    found = []
    for folder in sorted(adapters_in(checkpoint)):
        try:
            TensorFile(folder / WEIGHTS_FILE).check_digest()
        except AdapterFileError as error:
            found.append(f"{error}")
    # with that option of torch off there are none
    checked = torch.serialization.get_crc32_options()
    for path in parts_of(checkpoint) if checked else ():
        fault = _archive_fault(path)
        found += [f"{path.name} {fault}"] if fault else []
    return found


def random_states(numbers: set[str], world: int) -> Verdict:
    """Return what is to be said of the files with random states that a checkpoint has.

    Args:
        numbers: Of the processes that wrote one, as the files' names say; ``""`` for no number.
        world: How many processes this run has.
    """
    wanted = {str(rank) for rank in range(world)} if world > 1 else {""}
    if wanted <= numbers:
        return Verdict()
    saved = {""} if "" in numbers else {str(rank) for rank in range(len(numbers))}
    if not numbers:
        return Verdict()
    if numbers == saved and (len(saved) > 1 or "" in saved):
        told = f"it is of a run of {len(saved)} processes, and this one has {world}"
        return Verdict(lacks=(f"this run's random state ({told})",))
    missing = ", ".join(sorted(wanted - numbers))
    return Verdict(faults=(f"the random state of process {missing} is missing",))


def _verdict(checkpoint: Path, judge: Judge, reads: bool) -> Verdict:
    """Return what all machines have to say of a checkpoint; every process takes part."""
    own = judge(checkpoint) if reads else None
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return own or Verdict()
    found = [verdict for verdict in from_all(own) if verdict is not None]
    return Verdict(
        tuple(dict.fromkeys(line for v in found for line in v.faults)),
        tuple(dict.fromkeys(line for v in found for line in v.lacks)),
        unfinished=all(v.unfinished for v in found if v.faults),
    )


def _warn_of(checkpoint: Path, verdict: Verdict) -> None:
    if verdict.lacks:
        _warn(
            f"A run that goes on from {checkpoint} ends otherwise than one that was never "
            "interrupted, because it goes on without these",
            verdict.lacks,
        )


def _warn(headline: str, lines: Sequence[str]) -> None:
    warnings.warn(listing(headline, lines), HfLoRAWarning, stacklevel=6)


def _archive_fault(path: Path) -> str | None:
    """Return what is wrong with a file that ``torch.save`` wrote, by the checksums inside it."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_ZIP))
        if start and start != _ZIP:
            return None  # no archive; what torch saved before it wrote them has no checksums
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        return f"is damaged or cut short: {error}"
    return f"is damaged: the checksum of its {broken} differs" if broken else None
