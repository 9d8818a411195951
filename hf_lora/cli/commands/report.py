"""``hf-lora report``: a page about adapters."""

from pathlib import Path

from hf_lora.cli.output import Result, plain
from hf_lora.errors import SaveError
from hf_lora.planning.records import size
from hf_lora.recipes.progress import bars
from hf_lora.report.facts import collect, dead, total_norm
from hf_lora.report.page import page


def run(adapters: list[str], output: Path, base: str | None) -> Result:
    """Write a page about one adapter or several.

    Raises:
        HfLoRAError: An adapter cannot be read, or the page cannot be written.
    """
    with bars() as progress:
        task = progress.add_task("reading", total=None)
        figures = collect(
            adapters,
            base=base,
            progress=lambda words, done, total: progress.update(
                task, description=words, completed=done, total=total
            ),
        )
    text = page(figures)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{output} cannot be written: {error}") from error
    found = [
        {
            "name": each.name,
            "norm": total_norm(each),
            "dead": dead(each),
            "layers": [plain(layer) for layer in each.layers],
            "clients": [plain(verdict) for verdict in each.clients],
        }
        for each in figures.adapters
    ]
    data = {
        "page": output,
        "bytes": len(text.encode()),
        "adapters": found,
        "similarities": plain(figures.similarities),
    }
    names = ", ".join(each.name for each in figures.adapters)
    return Result(data=data, text=f"{output}: {names} ({size(len(text.encode()))}, one file)")
