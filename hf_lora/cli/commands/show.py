"""``hf-lora show``: what an adapter holds, from its files alone."""

from dataclasses import replace
from pathlib import Path

from hf_lora.adapter_io.describe import describe
from hf_lora.cli.output import Result, plain
from hf_lora.hub.download import locate
from hf_lora.recipes.progress import bars


def run(adapter: str, revision: str | None, subfolder: str | None) -> Result:
    """Describe an adapter in a folder or on the Hub.

    Raises:
        AdapterFileError, HubError: As for :func:`hf_lora.load`.
    """
    folder = locate(adapter, revision=revision, subfolder=subfolder)
    with bars() as progress:
        task = progress.add_task("reading", total=None)
        found = describe(
            folder, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if not Path(adapter).exists():  # of a repo, not where the cache has it
        at = f" at {revision}" if revision else ""
        found = replace(found, folder=f"{adapter}{at}{f', {subfolder}' if subfolder else ''}")
    counts = {name: getattr(found, name) for name in ("parameters", "dead", "causes")}
    data = {**plain(found), **counts}
    return Result(data=data, text=str(found), refused=bool(found.not_finite))
