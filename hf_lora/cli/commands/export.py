"""``hf-lora export``: an adapter as other software reads it, or who can use it."""

from pathlib import Path

from hf_lora.cli.output import Result
from hf_lora.clients.export import export, servable


def run(
    adapter: str,
    client: str | None,
    output: Path | None,
    *,
    base: str | None,
    dtype: str | None,
    merged: bool,
    converter: Path | None,
    revision: str | None,
    subfolder: str | None,
) -> Result:
    """Write the files, or tell who can use the adapter if no client is named.

    Raises:
        HfLoRAError: As for :func:`hf_lora.export`.
    """
    where = {"base": base, "revision": revision, "subfolder": subfolder}
    if client is None or output is None:
        found = servable(adapter, **where)
        return Result(data=found.to_dict(), text=str(found))
    done = export(adapter, output, client, dtype=dtype, merged=merged, converter=converter, **where)
    return Result(data=done.to_dict(), text=str(done))
