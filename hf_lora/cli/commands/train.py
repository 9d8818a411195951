"""``hf-lora train``: an adapter from a recipe."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hf_lora.cli.output import Result, plain
from hf_lora.files.data import WEIGHTS_FILE
from hf_lora.files.read import read_folder
from hf_lora.planning.records import size
from hf_lora.recipes.going_on import TrainingStopped
from hf_lora.recipes.history import HISTORY_FILE, PICTURE
from hf_lora.recipes.opened import TOKENIZER_FILE
from hf_lora.recipes.record import RECORD_FILE, Trained
from hf_lora.recipes.train import train


def run(
    path: Path,
    *,
    settings: Sequence[str],
    output: Path | None,
    resume: bool,
    more: float | None = None,
) -> Result:
    """Train what a recipe says, and push it if the recipe says so.

    Raises:
        HfLoRAError: The recipe, the data or the base cannot be used, or training cannot work.
    """
    try:
        trained = train(path, settings=settings, output=output, resume=resume, more=more)
    except TrainingStopped as stopped:
        words = [f"--set {shlex.quote(setting)}" for setting in settings]
        words += [f"--output {shlex.quote(str(output))}"] if output else []
        again = " ".join(["hf-lora train", shlex.quote(str(path)), *words, "--resume"])
        raise KeyboardInterrupt(f"{stopped}. Go on with:\n  {again}") from stopped
    return Result(
        data={
            "adapter": trained.adapter,
            "best": plain(trained.best),
            "tries": plain(trained.runs),
            "examples": {
                "train": trained.train_examples,
                "eval": trained.eval_examples,
                **plain(trained.rows),
            },
            "bytes": (trained.adapter / WEIGHTS_FILE).stat().st_size,
            "pushed": trained.pushed,
        },
        text=_text(trained),
    )


def _text(trained: Trained) -> str:
    rows = [("learning rate", "steps", "train loss", "eval loss", "seconds", "")]
    for each in trained.runs:
        loss = "-" if each.eval_loss is None else f"{each.eval_loss:.4f}"
        kept = "kept" if each == trained.best and len(trained.runs) > 1 else ""
        rows.append(
            (
                f"{each.learning_rate:g}",
                str(each.steps),
                f"{each.train_loss:.4f}",
                loss,
                f"{each.seconds:.1f}",
                kept,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    folder, weight = trained.adapter, size((trained.adapter / WEIGHTS_FILE).stat().st_size)
    lines.append(f"adapter: {folder} ({weight}; {', '.join(_beside(folder))} beside it)")
    if trained.pushed is not None:
        lines.append(f"pushed: {trained.pushed}")
    lines += ["", "next:", *(f"  hf-lora {words}" for words in _next(folder))]
    return "\n".join(line.rstrip() for line in lines)


def _beside(folder: Path) -> list[str]:
    """Return what else there is, in the order in which it is of use."""
    names = [TOKENIZER_FILE, PICTURE, HISTORY_FILE, RECORD_FILE]
    return ["the tokenizer" if n == TOKENIZER_FILE else n for n in names if (folder / n).exists()]


def _next(folder: Path) -> list[str]:
    """Return commands that somebody with a fresh adapter may want."""
    named = shlex.quote(str(folder))
    if read_folder(folder).fields.get("task_type") not in (None, "CAUSAL_LM"):  # writes no text
        return [f"show {named}", f"report {named} -o report.html", f"push {named} USER/NAME"]
    return [
        f'generate {named} --compare --prompt "..."',
        f"chat {named}",
        f"eval {named} DATA",
        f"merge {named} --output merged",
        f"push {named} USER/NAME",
    ]
