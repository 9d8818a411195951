"""The page that ``zoo.py`` writes."""

import collections
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Row = dict[str, Any]
RESULTS = ("pass", "refused", "fail")
_NEEDS = re.compile(r"requires the (\w+) library")


def report(rows: list[Row], total: int, versions: str) -> str:
    """Return the page.

    Args:
        rows: What became of each type that was looked at.
        total: How many types there are.
        versions: Of what it was run with.
    """
    return "\n".join(_lines(rows, total, versions)) + "\n"


def _lines(rows: list[Row], total: int, versions: str) -> Iterator[str]:
    built = [row for row in rows if row["result"] != "not here"]
    yield "# Every model type of transformers, tiny and random"
    yield ""
    yield (
        "Written by `python -m examples.benchmarks.zoo report`; what is checked, and what is "
        f"equal, says `zoo.py`. Run with {versions}."
    )
    yield ""
    yield (
        f"Of the {total} types that the auto classes of models know, {len(rows)} have been looked "
        f"at. {len(built)} of them are built and run here, each in the first of its classes that "
        "does, from its own configuration made small."
    )
    yield ""
    yield "| | hf_lora | PEFT |"
    yield "|---|---|---|"
    asked = [row for row in built if "peft_result" in row]
    for result in RESULTS:
        ours = _share(row["result"] == result for row in built)
        theirs = _share(row["peft_result"] == result for row in asked)
        yield f"| {result} | {ours} | {theirs} |"
    yield ""
    yield (
        "PEFT is asked for what it has: its own adapter on the same model; that its files are "
        "read by others is not asked of it. Fails are counted by what failed first."
    )
    for title, prefix in (("hf_lora", ""), ("PEFT", "peft_")):
        yield from _kinds(title, built, prefix)
    yield from _not_here([row for row in rows if row["result"] == "not here"])
    yield ""
    yield "## All that are built"
    yield ""
    yield (
        "Layers are those of all-linear, then those that the words attention, mlp and experts "
        "mean; reached are the modules with parameters that the inputs lead to, of all."
    )
    yield ""
    yield "| type | class | layers | attention, mlp, experts | reached | hf_lora | PEFT |"
    yield "|---|---|---|---|---|---|---|"
    for row in built:
        words = ", ".join(str(row.get(word, "")) for word in ("attention", "mlp", "experts"))
        reached = " of ".join(map(str, row.get("reached", ())))
        cells = (row["type"], row.get("class", ""), str(row.get("layers", "")), words, reached)
        yield f"| {' | '.join(cells)} | {_said(row, '')} | {_said(row, 'peft_')} |"


def _share(found: Iterable[bool]) -> str:
    each = list(found)
    return f"{sum(each)} of {len(each)} ({100 * sum(each) / max(len(each), 1):.1f} %)"


def _said(row: Row, prefix: str) -> str:
    kind = row.get(f"{prefix}kind")
    result = row.get(f"{prefix}result", "")
    return f"{result}: {kind}" if kind else result


def _kinds(title: str, built: list[Row], prefix: str) -> Iterator[str]:
    yield ""
    yield f"## {title}: what does not pass"
    yield ""
    yield "| result | kind | types | which | reason of the first |"
    yield "|---|---|---|---|---|"
    found = _grouped(
        (row for row in built if row.get(f"{prefix}result", "pass") != "pass"),
        lambda row: (row[f"{prefix}result"], row[f"{prefix}kind"]),
    )
    for (result, kind), rows in found:
        names = ", ".join(row["type"] for row in rows)
        yield (
            f"| {result} | {kind} | {len(rows)} | {names} | "
            f"{_cell(rows[0].get(f'{prefix}reason', ''))} |"
        )


def _not_here(rows: list[Row]) -> Iterator[str]:
    yield ""
    yield "## Not built or not run here"
    yield ""
    yield "| types | which | reason of the first |"
    yield "|---|---|---|"
    for reason, group in _grouped(rows, lambda row: _cause(row["reason"])):
        names = ", ".join(row["type"] for row in group)
        yield f"| {len(group)} | {names} | {_cell(reason)} |"


def _cause(reason: str) -> str:
    needed = _NEEDS.search(reason)
    return f"{needed[1]} is not installed" if needed else reason


def _grouped(rows: Iterable[Row], by: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    found: dict[Any, list[Row]] = collections.defaultdict(list)
    for row in rows:
        found[by(row)].append(row)
    return sorted(found.items(), key=lambda item: (-len(item[1]), str(item[0])))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:240]
