"""``hf-lora merge``: adapters into a base on disk."""

from pathlib import Path
from typing import Any

from hf_lora.cli.options import weighed
from hf_lora.cli.output import Result
from hf_lora.file_merging.merge import merge_checkpoint


def run(
    adapters: list[str], output: Path, *, base: str | None, plot: Path | None, **how: Any
) -> Result:
    """Merge, and draw what was rounded away if a picture is wanted.

    Raises:
        HfLoRAError: As for :func:`hf_lora.merge_checkpoint`.
    """
    report = merge_checkpoint(base, weighed(adapters), output, **how)
    if plot is not None:
        report.plot(plot)
    return Result(data=report.to_dict(), text=str(report))
