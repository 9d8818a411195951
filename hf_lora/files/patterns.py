"""Matching patterns that a stranger wrote: PEFT's meaning, a limit on the time they may take.

A regular expression can be made to run for years. Names without special characters are compared
as text; everything else is matched by a machine that can be stopped.
"""

import re
import time
from collections.abc import Iterable

import regex

from hf_lora.errors import AdapterFileError

_SECONDS = 1.0
_LONGEST = 4_096
_SPECIAL = re.compile(r"[^\w.\-]")


class Patience:
    """A budget of time for all the patterns of one file.

    Args:
        source: What to name in the error.
    """

    def __init__(self, source: str):
        self.source = source
        self.deadline = time.monotonic() + _SECONDS

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Say whether ``pattern`` matches the whole of ``text``.

        Raises:
            AdapterFileError: No regular expression, too long, or out of time.
        """
        if len(pattern) > _LONGEST:
            raise AdapterFileError(f"{self.source}: a pattern of {len(pattern)} characters")
        left = self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            return regex.fullmatch(pattern, text, timeout=left) is not None
        except TimeoutError:
            raise AdapterFileError(
                f"{self.source}: matching the pattern {pattern[:80]!r} takes too long; a file made "
                "in good faith names its layers plainly"
            ) from None
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise AdapterFileError(
                f"{self.source}: {pattern[:80]!r} is not a regular expression: {error}"
            ) from None

    def first_tail(self, patterns: Iterable[str], path: str) -> str | None:
        """Return the first of ``patterns`` that means ``path`` as PEFT's ``*_pattern`` maps do."""
        for pattern in patterns:
            if _SPECIAL.search(pattern) is None:
                # in a plain name only the dot is special, and it stands for itself
                if path == pattern or path.endswith(f".{pattern}"):
                    return pattern
            elif self.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
                return pattern
        return None


class TailIndex:
    """Literal names matched as whole dotted tails, without trying each name on each path."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)

    def means(self, path: str) -> bool:
        """Say whether one of the names is ``path`` or a whole dotted tail of it."""
        if path in self.names:
            return True
        while "." in path:
            path = path.partition(".")[2]
            if path in self.names:
                return True
        return False
