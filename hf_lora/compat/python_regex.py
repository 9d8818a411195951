"""Python's own parser of regular expressions. Seen in CPython 3.11 to 3.14.

It moved once, in 3.11. Where it is not, only patterns in files cannot be read.
"""

from typing import Any

from hf_lora.errors import AdapterFileError

try:
    from re import _constants, _parser  # type: ignore[attr-defined]
except ImportError:
    _constants = _parser = None

codes: Any = _constants
"""The names of what a parsed pattern is made of."""


def parse(pattern: str) -> Any:
    """Return a pattern as nodes: pairs of one of :data:`codes` and what it holds.

    Without it the syntax of patterns would be ours, and differ from Python's in what nobody tries.

    Raises:
        AdapterFileError: This Python has its parser elsewhere.
        re.error: The pattern is none.
    """
    if _parser is None:
        raise AdapterFileError(
            "Patterns in adapter files are read by Python's own parser, which this version of "
            "Python keeps elsewhere; use one that hf_lora supports, or name the layers plainly."
        )
    return _parser.parse(pattern)
