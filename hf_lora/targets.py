"""What a target pattern means, in one place: whole dotted path or whole dotted tail of it."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator

from hf_lora.errors import ConfigError

_MOST_NEIGHBOURS = 4


def compile_target(pattern: str) -> re.Pattern[str]:
    """Compile a target so that ``fullmatch(path)`` says whether it means the module at ``path``.

    Raises:
        ConfigError: The pattern is not a regular expression; the message says where it breaks.
    """
    try:
        re.compile(pattern)  # alone first: the frame below could balance a stray parenthesis
        return re.compile(rf"(?:.*\.)?(?:{pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"The pattern {pattern!r} is not a regular expression: {error}") from None


def inside(path: str, parents: Collection[str]) -> bool:
    """Say whether ``path`` is one of ``parents`` or lies below one."""
    while path:
        if path in parents:
            return True
        path = path.rpartition(".")[0]
    return False


def parents(path: str) -> Iterator[str]:
    """Yield the dotted paths above ``path``, the nearest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def nearest(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return up to four module names that a mistyped pattern may have meant, best first."""
    paths = [path for path in paths if path]
    wanted = pattern.rsplit(".", 1)[-1].replace("\\", "")
    tails = dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)
    words = [tail for tail in tails if not tail.isdigit()]
    near = difflib.get_close_matches(wanted, words, n=_MOST_NEIGHBOURS, cutoff=0.5)
    if not near:
        near = [word for word in words if wanted.lower() in word.lower()][:_MOST_NEIGHBOURS]
    return near


def shortest_names(chosen: Collection[str], everything: Iterable[str]) -> list[str]:
    """Return literal names that, matched as whole dotted tails, mean exactly the ``chosen`` paths.

    A last name such as ``q_proj`` stands for all modules that end in it if every one of them is
    chosen; the others are written out in full. The result is sorted.
    """
    tails: dict[str, bool] = {}
    for path in everything:
        tail = path.rsplit(".", 1)[-1]
        tails[tail] = tails.get(tail, True) and path in chosen
    names = {path.rsplit(".", 1)[-1] for path in chosen}
    short = {name for name in names if tails.get(name, False)}
    return sorted(short | {path for path in chosen if path.rsplit(".", 1)[-1] not in short})
