"""Text for a person's screen, whoever wrote it: escaped, shortened, counted.

A name in a file or a server's answer may be megabytes long, or drive a terminal. Every message of
hf_lora passes through here, so that no single place has to remember it.
"""

from collections.abc import Iterable

_LONGEST_LINE = 2500
_LONGEST = 4500
_LONGEST_SHOWN = 120
_MOST_NAMES = 5


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
