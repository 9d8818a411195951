"""Regular expressions that a stranger wrote, matched in bounded time and memory.

Engines that backtrack can be made to run for years; and one that is stopped after half a second
can have filled the memory by then (measured: ``(?:(?:(?:.?){65535}){65535}){65535}x`` took 11 GB
of the package ``regex`` with a timeout of 0.5 s). Here a pattern is a function from a set of
positions in the text to the set of positions where it can end. A set is one integer, bit i
for position i, so that all ways to match are followed at once and nothing is tried twice.

Python's own parser reads the pattern, so the syntax is Python's. What has no meaning for sets of
positions (references to groups, atomic groups) is refused.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from hf_lora.compat.python_regex import codes as op
from hf_lora.compat.python_regex import parse
from hf_lora.errors import AdapterFileError
from hf_lora.text import show

Step = Callable[["Text", int], int]
"""From the positions where a match may begin to those where it may end."""

_MOST_STEPS = 1_000_000
"""About one second of work. A count and not a clock: a slow machine refuses no more than others."""

_STEPS_TO_READ = 12
"""What reading one character of a pattern costs, in such steps."""

_LONGEST = 16_384
_DIGITS = "0123456789"
_IGNORED_FLAGS = re.UNICODE | re.VERBOSE | re.DOTALL


class Budget:
    """What all the patterns of one file together may cost.

    Args:
        source: What to name in errors.
    """

    def __init__(self, source: str):
        self.source = source
        self._left = _MOST_STEPS

    def spend(self, steps: int) -> None:
        """Count work done.

        Raises:
            AdapterFileError: Too much.
        """
        self._left -= steps
        if self._left < 0:
            raise AdapterFileError(
                f"{self.source}: matching its patterns takes too long; a file made in good faith "
                "names its layers plainly"
            )


class Text:
    """A text to match, with what is known about where things stand in it."""

    def __init__(self, text: str, patience: Budget):
        self.text = text
        self.patience = patience
        self.everywhere = (1 << (len(text) + 1)) - 1
        self._found: dict[Any, int] = {}

    def where(self, key: Any, search: Callable[[str], int]) -> int:
        """Return the positions that ``search`` finds, looked for once."""
        found = self._found.get(key)
        if found is None:
            self.patience.spend(1 + len(self.text) // 8)
            found = self._found[key] = search(self.text)
        return found


class Pattern:
    """A regular expression, checked and ready to match.

    Raises:
        AdapterFileError: It is none, too long, or uses what is not supported.
    """

    def __init__(self, pattern: str, patience: Budget):
        self.pattern = pattern
        patience.spend(20 + _STEPS_TO_READ * min(len(pattern), _LONGEST))
        if len(pattern) > _LONGEST:
            raise AdapterFileError(f"{patience.source}: a pattern of {len(pattern)} characters")
        compiler = _Compiler()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = parse(pattern)
            if tree.state.flags & ~_IGNORED_FLAGS:
                raise re.error("flags are not supported")
            self._step = compiler.sequence(tree)
        except (re.error, RecursionError, OverflowError, ValueError) as error:
            raise AdapterFileError(
                f"{patience.source}: {show(pattern)} is not a regular expression that can be "
                f"matched safely: {error}"
            ) from None
        self._digits = str.maketrans(compiler.like_digits())
        self._known: dict[tuple[str, bool], bool] = {}

    def ends(self, text: Text, starts: int) -> int:
        """Return where a match can end that begins at one of ``starts``."""
        try:
            return self._step(text, starts)
        except RecursionError:
            raise AdapterFileError(
                f"{text.patience.source}: {show(self.pattern)} is nested too deeply"
            ) from None

    def fullmatch(self, text: Text) -> bool:
        """Say whether the pattern matches the whole text."""
        return self._matches(text, tail=False)

    def matches_tail(self, text: Text) -> bool:
        """Say whether the pattern matches the whole text, or all of it after some dot."""
        return self._matches(text, tail=True)

    def _matches(self, text: Text, *, tail: bool) -> bool:
        # layers differ by numbers, of which most patterns tell few digits apart
        same = text.text.translate(self._digits)
        text.patience.spend(1)
        known = self._known.get((same, tail))
        if known is None:
            starts = 1 | (text.where(".", lambda t: _positions(t, ".")) << 1 if tail else 0)
            known = bool(self.ends(text, starts) >> len(text.text) & 1)
            self._known[same, tail] = known
        return known


def positions(mask: int) -> Iterable[int]:
    """Yield the positions in a set, the last first."""
    while mask:
        last = mask.bit_length() - 1
        yield last
        mask ^= 1 << last


def _positions(text: str, word: str) -> int:
    mask, at = 0, text.find(word)
    while at >= 0:
        mask |= 1 << at
        at = text.find(word, at + 1)
    return mask


class _Compiler:
    """Turns what Python's parser made of a pattern into steps."""

    def __init__(self) -> None:
        self._answers: dict[str, list[bool]] = {digit: [] for digit in _DIGITS}
        """What each question that the pattern puts to a character is answered for a digit."""

    def like_digits(self) -> dict[str, str]:
        """Return each digit and the first that is like it in every place of the pattern."""
        first: dict[tuple[bool, ...], str] = {}
        return {digit: first.setdefault(tuple(a), digit) for digit, a in self._answers.items()}

    def sequence(self, nodes: Iterable[tuple[Any, Any]]) -> Step:
        steps: list[Step] = []
        word = ""
        for code, value in nodes:
            if code is op.LITERAL:
                word += chr(value)
                continue
            if word:
                steps.append(self._literal(word))
                word = ""
            steps.append(self._node(code, value))
        if word:
            steps.append(self._literal(word))
        return steps[0] if len(steps) == 1 else _all_of(steps)

    def _node(self, code: Any, value: Any) -> Step:
        if code in (op.NOT_LITERAL, op.ANY, op.IN):
            for digit, answers in self._answers.items():
                answers.append(_is_one_of(digit, code, value))
            return _character(code, value)
        if code is op.BRANCH:
            return _any_of([self.sequence(nodes) for nodes in value[1]])
        if code is op.SUBPATTERN:
            _, added, removed, nodes = value
            if (added | removed) & ~_IGNORED_FLAGS:
                raise re.error("flags are not supported")
            return self.sequence(nodes)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, nodes = value
            return _repeat(int(low), int(high), self.sequence(nodes))
        if code in (op.ASSERT, op.ASSERT_NOT):
            direction, nodes = value
            width = nodes.getwidth() if direction < 0 else (0, 0)
            if width[0] != width[1]:
                raise re.error("look-behind requires fixed-width pattern")
            return _look(self.sequence(nodes), direction, width[0], code is op.ASSERT)
        if code is op.AT:
            return _at(value)
        if code is op.FAILURE:
            return lambda text, starts: 0
        raise re.error(f"{str(code).lower()} is not supported")

    def _literal(self, word: str) -> Step:
        for character in word:
            if character in _DIGITS:
                for digit, answers in self._answers.items():
                    answers.append(digit == character)
        return _literal(word)


def _all_of(steps: list[Step]) -> Step:
    def run(text: Text, starts: int) -> int:
        for step in steps:
            if not starts:
                return 0
            text.patience.spend(1)
            starts = step(text, starts)
        return starts

    return run


def _literal(word: str) -> Step:
    def run(text: Text, starts: int) -> int:
        return (starts & text.where(word, lambda t: _positions(t, word))) << len(word)

    return run


def _character(code: Any, value: Any) -> Step:
    known: dict[str, bool] = {}
    key = object()

    def holds(character: str) -> bool:
        if character not in known:
            known[character] = _is_one_of(character, code, value)
        return known[character]

    def search(text: str) -> int:
        return sum(1 << at for at, character in enumerate(text) if holds(character))

    return lambda text, starts: (starts & text.where(key, search)) << 1


def _is_one_of(character: str, code: Any, value: Any) -> bool:
    if code is op.ANY:
        return character != "\n"
    if code is op.LITERAL:
        return ord(character) == value
    if code is op.NOT_LITERAL:
        return ord(character) != value
    if code is op.RANGE:
        return value[0] <= ord(character) <= value[1]
    if code is op.CATEGORY:
        return _is_in_category(character, value)
    negated = bool(value) and value[0][0] is op.NEGATE
    return negated != any(_is_one_of(character, *item) for item in value[negated:])


def _is_in_category(character: str, category: Any) -> bool:
    kind = str(category).removeprefix("CATEGORY_")
    negated = kind.startswith("NOT_")
    found = {
        "DIGIT": character.isdecimal(),
        "SPACE": character.isspace(),
        "WORD": character.isalnum() or character == "_",
    }[kind.removeprefix("NOT_")]
    return found != negated


def _any_of(steps: list[Step]) -> Step:
    def run(text: Text, starts: int) -> int:
        ends = 0
        for step in steps:
            text.patience.spend(1)
            ends |= step(text, starts)
        return ends

    return run


def _repeat(low: int, high: int, step: Step) -> Step:
    def run(text: Text, starts: int) -> int:
        reached = starts
        for _ in range(low):
            text.patience.spend(1)
            after = step(text, reached)
            if after == reached:  # from here on every further round gives the same
                break
            reached = after
        new = reached
        for _ in range(high - low):
            text.patience.spend(1)
            new = step(text, new) & ~reached
            if not new:
                break
            reached |= new
        return reached

    return run


def _look(step: Step, direction: int, width: int, wanted: bool) -> Step:
    def run(text: Text, starts: int) -> int:
        holding = 0
        for at in positions(starts):
            text.patience.spend(1)
            begin = at - width
            ends = step(text, 1 << begin) if begin >= 0 else 0
            found = bool(ends >> at & 1) if direction < 0 else bool(ends)
            if found == wanted:
                holding |= 1 << at
        return holding

    return run


def _at(where: Any) -> Step:
    if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return lambda text, starts: starts & 1
    if where in (op.AT_END, op.AT_END_STRING):
        return lambda text, starts: starts & (1 << len(text.text))
    if where in (op.AT_BOUNDARY, op.AT_NON_BOUNDARY):
        inside = where is op.AT_NON_BOUNDARY
        return lambda text, starts: (
            starts & (text.where("\\b", _boundaries) ^ (text.everywhere if inside else 0))
        )
    raise re.error(f"{str(where).lower()} is not supported")


def _boundaries(text: str) -> int:
    words = [False, *(_is_in_category(c, op.CATEGORY_WORD) for c in text), False]
    return sum(1 << at for at in range(len(text) + 1) if words[at] != words[at + 1])
