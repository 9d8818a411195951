"""``hf-lora merge``: adapters into a base on disk."""

from pathlib import Path
from typing import Any

from hf_lora.cli.output import Result
from hf_lora.errors import ConfigError
from hf_lora.file_merging.merge import merge_checkpoint


def run(
    adapters: list[str], output: Path, *, base: str | None, plot: Path | None, **how: Any
) -> Result:
    """Merge, and draw what was rounded away if a picture is wanted.

    Raises:
        HfLoRAError: As for :func:`hf_lora.merge_checkpoint`.
    """
    report = merge_checkpoint(base, _weighed(adapters), output, **how)
    if plot is not None:
        report.plot(plot)
    return Result(data=report.to_dict(), text=str(report))


def _weighed(adapters: list[str]) -> dict[str, float]:
    """Return each adapter with its factor, which may stand behind it."""
    found: dict[str, float] = {}
    for each in adapters:
        name, sign, factor = each.rpartition("=")
        known = sign and not Path(each).exists()
        try:
            weight = float(factor) if known else 1.0
        except ValueError:
            raise ConfigError(f"{each!r}: {factor!r} is no factor; write NAME=0.5") from None
        name = name if known else each
        if name in found:
            raise ConfigError(f"{name!r} is named twice; give it one factor")
        found[name] = weight
    return found
