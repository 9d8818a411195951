"""What names and patterns in an ``adapter_config.json`` mean, as PEFT reads them.

Literal names are looked up and never tried one by one: a file may hold very many.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from hf_lora.files.bounded_regex import Budget, Pattern, Text, positions
from hf_lora.targets import parents as parents

SPECIAL = re.compile(r"[^\w.\-]")
"""What a regular expression may read as something else than itself, apart from the dot."""

_INDEX = re.compile(r"\.(\d+)\.", re.ASCII)


def tails(path: str) -> Iterator[str]:
    """Yield a dotted path and its dotted tails, longest first."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def endings(path: str, names: Collection[str]) -> set[str]:
    """Return those of ``names`` that are the end of ``path``, at a dot or not."""
    return {path[start:] for start in range(len(path)) if path[start:] in names}


class TailIndex:
    """Literal names that mean a path if they are the path or a whole dotted tail of it."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)

    def means(self, path: str) -> bool:
        """Say whether one of the names means ``path``."""
        return any(tail in self.names for tail in tails(path))


class PatternMap:
    """PEFT's ``rank_pattern`` and ``alpha_pattern``: the first pattern that fits a tail decides.

    Args:
        values: Pattern to value.
        patience: The budget of the file that they come from.
    """

    def __init__(self, values: Mapping[str, Any], patience: Budget):
        self._patience = patience
        self._plain: dict[str, tuple[int, Any]] = {}
        self._patterns: list[tuple[int, Pattern, Any]] = []
        for order, (pattern, value) in enumerate(values.items()):
            if SPECIAL.search(pattern) is None:
                # in a plain name only the dot is special, and it stands for itself
                self._plain[pattern] = (order, value)
            else:
                self._patterns.append((order, Pattern(pattern, patience), value))

    def get(self, path: str, default: Any) -> Any:
        """Return the value for ``path``."""
        last = len(self._plain) + len(self._patterns)
        found = [self._plain[tail] for tail in tails(path) if tail in self._plain]
        best, value = min(found, key=lambda item: item[0], default=(last, default))
        text = Text(path, self._patience) if self._patterns else None
        for order, pattern, other in self._patterns:
            if order > best:
                break
            assert text is not None
            if pattern.matches_tail(text):
                return other
        return value


class LayerIndex:
    """PEFT's ``layers_to_transform`` and ``layers_pattern``: which numbered layers are meant.

    Args:
        numbers: The layers.
        names: Patterns of what stands before a number; none for anything.
        patience: The budget of the file that they come from.
    """

    def __init__(self, numbers: Collection[int], names: Iterable[str], patience: Budget):
        self._numbers = frozenset(numbers)
        self._patience = patience
        self._patterns = [Pattern(name, patience) for name in names]

    def means(self, path: str) -> bool:
        """Say whether ``path`` lies in one of the layers."""
        number = self._number(path)
        return number is not None and number in self._numbers

    def _number(self, path: str) -> int | None:
        if not self._patterns:
            # PEFT wants two names before the number, and takes the first number that has them
            start = path.find(".")
            found = _INDEX.search(path, start + 1) if start >= 0 else None
            return int(found[1]) if found else None
        text = Text(path, self._patience)
        begins = [0, *(at + 1 for at, character in enumerate(path) if character == ".")]
        for pattern in self._patterns:
            for begin in begins:
                for end in positions(pattern.ends(text, 1 << begin)):
                    found = _INDEX.match(path, end)
                    if found:
                        return int(found[1])
        return None
