"""Text for a person's screen, whoever wrote it: escaped, shortened, counted.

A name in a file or a server's answer may be megabytes long, or drive a terminal. Every message of
hf_lora passes through here, so that no single place has to remember it.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence

_LONGEST_LINE = 2500
_LONGEST = 4500
_LONGEST_SHOWN = 120
_MOST_NAMES = 5
_FEW = 3
"""So many lines that differ in a number are not worth a line for all."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""Of a layer, in the middle of a path."""


def printable(text: str, longest: int | None = _LONGEST) -> str:
    """Return ``text`` with line breaks, and nothing else that a terminal would obey.

    Args:
        text: Anything.
        longest: Characters that it may have; None for as many as there are. Each line is shortened
            in any case, in its middle: what is said first and last is mostly ours.
    """
    # split by "\n" alone: what else splitlines takes for the end of a line is escaped instead
    whole = "\n".join(map(_printable_line, text.split("\n")))
    return whole if longest is None else _shortened(whole, longest)


def show(value: object) -> str:
    """Return ``value`` as a message shows it: quoted, escaped, and at most a line long."""
    text = repr(value if not isinstance(value, str) else value[: _LONGEST_SHOWN + 1])
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def some(names: Iterable[str], most: int = _MOST_NAMES) -> str:
    """Return the first of the names, quoted, and how many more there are."""
    every = list(names)
    shown = ", ".join(map(show, every[:most]))
    return f"{shown} and {len(every) - most} more" if len(every) > most else shown


def by_number(path: str) -> list[tuple[int, str | int]]:
    """Return a key that sorts paths by their numbers, so that layer 2 stands before layer 10."""
    return [
        (0, int(part)) if part.isdecimal() else (1, part)  # never compared with one another
        for part in path.split(".")
    ]


def grouped(lines: Iterable[str]) -> list[str]:
    """Return lines, those that differ in nothing but numbers of layers as one.

    ``h.0.fc: gone``, ``h.1.fc: gone`` and so on become ``h.{0-11}.fc: gone``.
    """
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(_NUMBER.sub("{}", line), []).append(line)
    found = []
    for kind, members in kinds.items():
        numbers = [tuple(map(int, _NUMBER.findall(line))) for line in members]
        together = _ranges(numbers) if len(members) > _FEW else None
        if together is None:
            found += members
        else:
            pieces = kind.split("{}")
            marks = [*together, ""]
            found.append("".join(p + m for p, m in zip(pieces, marks, strict=False)))
    return found


def _ranges(numbers: Sequence[tuple[int, ...]]) -> list[str] | None:
    """Return what to write for the numbers at each place, if that says which lines there were."""
    places = [sorted(set(place)) for place in zip(*numbers, strict=True)]
    varying = [place for place in places if len(place) > 1]
    # the same number at several places of a line, or every number with every other
    alike = all(
        len({n for n, p in zip(row, places, strict=True) if len(p) > 1}) <= 1 for row in numbers
    )
    whole = math.prod(map(len, varying)) == len(set(numbers))
    if not varying or len(set(numbers)) < len(numbers) or not (alike or whole):
        return None
    return [_range(place) for place in places]


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return "{" + ",".join(runs) + "}"


def wrapped(text: str, width: int) -> str:
    """Return text whose lines end between words, and go on further to the right.

    Args:
        text: Lines, tables among them: what fits is left as it is.
        width: Characters in a line.
    """
    return "\n".join(_wrapped_line(line, width) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = len(line) - len(line.lstrip(" -"))
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * min(indent + 2, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    begin, end = longest * 2 // 3, longest // 6
    return f"{text[:begin]}... ({len(text) - begin - end} more characters) ...{text[-end:]}"


def _printable_line(line: str) -> str:
    line = _shortened(line, _LONGEST_LINE)
    if line.isprintable():
        return line
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return _shortened(escaped, _LONGEST_LINE)
