"""``hf-lora init``: a recipe to begin with."""

import shlex
from pathlib import Path

from hf_lora.cli.output import Result, plain
from hf_lora.planning.records import size
from hf_lora.recipes.progress import bars
from hf_lora.recipes.starting import Looked, begin, copy_example


def run(model: str, data: str, output: Path, *, split: str, gguf_file: str | None = None) -> Result:
    """Write a recipe for a model and data that are looked at.

    Raises:
        HfLoRAError: One of the two cannot be used, or the recipe is there already.
    """
    with bars() as progress:
        task = progress.add_task("looking at the data", total=None)
        looked = begin(
            model,
            data,
            output,
            split=split,
            gguf_file=gguf_file,
            progress=lambda rows: progress.update(task, completed=rows),
        )
    return Result(data={"recipe": output, **plain(looked)}, text=_text(looked, output))


def example(name: str, output: Path) -> Result:
    """Copy a shipped recipe and its data.

    Raises:
        ConfigError: There is no such example, or a file is there already.
    """
    written = copy_example(name, output)
    lines = ["written:", *(f"  {path}" for path in written), *_next(output)]
    return Result(data={"recipe": output, "files": written}, text="\n".join(lines))


def _text(looked: Looked, output: Path) -> str:
    lines = [
        f"data: {looked.rows:,} rows, read as {looked.form}; "
        f"{looked.median:,} tokens in the middle, {looked.longest:,} at most",
        f"model: the adapter has {looked.trained:,} parameters; a step takes about "
        f"{size(looked.memory)} of {size(looked.available)}",
        f"a step: {looked.batch_size} rows of up to {looked.max_length} tokens, "
        f"{looked.accumulation} of these",
    ]
    if looked.faulty:
        lines.append(f"{looked.faulty} rows cannot be used: train --dry-run names them")
    return "\n".join([*lines, f"recipe: {output}", *_next(output)])


def _next(output: Path) -> list[str]:
    named = shlex.quote(str(output))
    return ["", "next:", f"  hf-lora train {named} --dry-run", f"  hf-lora train {named}"]
