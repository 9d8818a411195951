"""Which tests are slow: what is left runs in two minutes, ``pytest -m "not slow"``.

The list is measured: ``pytest -v --durations=0 > LOG`` and then ``python -m tests.slow LOG``
write it anew. A test that is not in it yet runs.
"""

import re
import sys
from pathlib import Path

LIST = Path(__file__).with_name("slow.txt")
SECONDS = 0.5
"""What a test may take, and what its fixtures may, on a machine of two shared cores."""

_LINE = re.compile(r"\s*([\d.]+)s (call|setup|teardown)\s+(tests/[^\[\n]+)")


def names() -> frozenset[str]:
    """Return the files, and the tests without their parameters, that are slow."""
    return frozenset(LIST.read_text().split())


def is_slow(node: str, slow: frozenset[str]) -> bool:
    """Say whether a test is, or its whole file."""
    return node.partition("[")[0] in slow or node.partition("::")[0] in slow


def slow_in(log: str) -> list[str]:
    """Return what is slow by the durations that pytest has printed.

    A fixture that takes long is the file's: whichever test comes first waits for it.
    """
    found = set()
    for seconds, when, node in _LINE.findall(log):
        if float(seconds) >= SECONDS:
            found.add(node if when == "call" else node.partition("::")[0])
    return sorted(
        node for node in found if "::" not in node or node.partition("::")[0] not in found
    )


if __name__ == "__main__":
    LIST.write_text("\n".join(slow_in(Path(sys.argv[1]).read_text(errors="replace"))) + "\n")
