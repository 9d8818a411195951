"""``hf-lora train --dry-run``: what a recipe would do."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hf_lora.cli.output import Result, plain
from hf_lora.planning.records import size
from hf_lora.recipes.estimate import in_words
from hf_lora.recipes.preview import Piece, Preview, preview

_MOST_CHARACTERS = 700


def run(path: Path, *, settings: Sequence[str], output: Path | None) -> Result:
    """Show rows, counts, memory and time; train nothing, write nothing.

    Raises:
        HfLoRAError: The recipe, the data or the base cannot be used.
    """
    found = preview(path, settings, output)
    data = {**plain(found), "memory": found.memory}
    return Result(data=data, text="\n".join(_lines(found, path)))


def _lines(found: Preview, path: Path) -> list[str]:
    lines = []
    for number, row in enumerate(found.rows, 1):
        tokens = sum(piece.tokens for piece in row)
        learned = sum(piece.tokens for piece in row if piece.learned)
        lines.append(f"row {number}: {tokens} tokens, {learned} learned: those between « and »")
        lines += [f"  | {line}" for line in _shown(row).split("\n")]
    counts = found.counts
    lines += ["", *(f"data: {source}" for source in found.sources)]
    lines.append(f"  {found.train_examples:,} to train on, {found.eval_examples:,} to evaluate")
    lost = {
        f"cut to {found.max_length} tokens": counts.cut,
        "left out, with nothing to learn": counts.dropped,
        "beyond their source's share": counts.unused,
    }
    lines += [
        f"  {count:,} of {counts.rows:,} rows {what}" for what, count in lost.items() if count
    ]
    share = found.learned / max(found.tokens, 1)
    filling = 1 - found.tokens / max(found.padded, 1)
    lines.append(
        f"tokens: {found.tokens:,} an epoch, {found.learned:,} learned ({share:.0%}); "
        f"batches are {filling:.0%} padding"
    )
    rates = ", ".join(f"{rate:g}" for rate in found.learning_rates)
    each = " at each rate" if len(found.learning_rates) > 1 else ""
    lines.append(
        f"steps: {found.steps:,}{each}, {found.batch} rows each, {found.epochs:g} epochs; "
        f"learning rate {rates}"
    )
    lines += [
        f"memory: about {size(found.memory)} of {size(found.available_bytes)}",
        f"  base {size(found.base_bytes)}, adapter with its optimizer "
        f"{size(found.adapter_bytes)}, a batch {size(found.step_bytes)}",
    ]
    if found.memory > found.available_bytes:
        lines.append("  too much: a smaller batch_size or max_length, gradient_checkpointing: true")
    lines.append(f"time: about {in_words(found.seconds)}, by the speed of products here")
    if found.faster:
        lines.append(f"  {found.faster} would be faster here: --set base.dtype={found.faster}")
    named = shlex.quote(str(path))
    return [*lines, "", "nothing was trained; next:", f"  hf-lora train {named}"]


def _shown(row: tuple[Piece, ...]) -> str:
    text = "".join(f"«{piece.text}»" if piece.learned else piece.text for piece in row)
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters ... {text[-half:]}"
