"""``hf-lora show``: what an adapter holds, from its files alone."""

from dataclasses import replace
from pathlib import Path

from hf_lora.adapter_io.describe import describe
from hf_lora.algebra.heatmap import base_norms, draw
from hf_lora.cli.output import Result, plain
from hf_lora.files.read import read_folder
from hf_lora.hub.download import locate
from hf_lora.recipes.progress import bars


def run(
    adapter: str,
    revision: str | None,
    subfolder: str | None,
    *,
    heatmap: Path | None = None,
    base: str | None = None,
) -> Result:
    """Describe an adapter in a folder or on the Hub, and draw it if a picture is wanted.

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
    text = str(found)
    if heatmap is not None:
        below = base_norms(read_folder(folder), base)
        norms = {layer.path: layer.norm for layer in found.layers}
        shares = {path: norm / below[path] for path, norm in norms.items() if path in below}
        what = "norm of update / norm of weight" if shares else "norm of update"
        draw(shares or norms, what, heatmap)
        data |= {"heatmap": str(heatmap), "heatmap_of": what, "shares": shares}
        text += f"\n{what}, drawn into {heatmap}" + ("" if shares else ": the base is not here")
    return Result(data=data, text=text, refused=bool(found.not_finite))
