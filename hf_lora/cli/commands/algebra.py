"""What computes with adapters from a shell: each is one call of the library."""

from pathlib import Path
from typing import Any

from hf_lora.algebra.combine import combine, resize
from hf_lora.algebra.diff import diff
from hf_lora.algebra.extract import extract
from hf_lora.algebra.record import DerivedAdapter
from hf_lora.algebra.similarity import similarity
from hf_lora.cli.options import weighed
from hf_lora.cli.output import Result


def combined(adapters: list[str], output: Path, **how: Any) -> Result:
    """Make one adapter of several and save it.

    Raises:
        HfLoRAError: As for :func:`hf_lora.combine`, or the folder cannot be written.
    """
    return _saved(combine(weighed(adapters), **how), output)


def resized(adapter: str, output: Path, **how: Any) -> Result:
    """Give an adapter another rank and save it.

    Raises:
        HfLoRAError: As for :func:`hf_lora.resize`, or the folder cannot be written.
    """
    return _saved(resize(adapter, **how), output)


def extracted(base: str, tuned: str, output: Path, **how: Any) -> Result:
    """Make an adapter of a fine-tuned model and save it.

    Raises:
        HfLoRAError: As for :func:`hf_lora.extract`, or the folder cannot be written.
    """
    return _saved(extract(base, tuned, **how), output)


def similar(one: str, other: str, *, check_base: bool) -> Result:
    """Compare two adapters.

    Raises:
        HfLoRAError: As for :func:`hf_lora.similarity`.
    """
    found = similarity(one, other, check_base=check_base)
    return Result(data=found.to_dict(), text=str(found))


def differing(one: str, other: str) -> Result:
    """Compare two adapters or two checkpoints.

    Raises:
        HfLoRAError: As for :func:`hf_lora.diff`.
    """
    found = diff(one, other)
    return Result(data=found.to_dict(), text=str(found))


def _saved(made: DerivedAdapter, output: Path) -> Result:
    made.save(output)
    data = made.to_dict() | {"directory": str(output)}
    return Result(data=data, text=f"{made}\nsaved to {output}")
