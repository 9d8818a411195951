"""Python's parser of regular expressions: it is there, and its nodes have these names."""

import pytest

from hf_lora.compat import python_regex
from hf_lora.compat.python_regex import codes, parse
from hf_lora.errors import AdapterFileError


def test_re_parser_gives_pairs_of_a_code_and_what_it_holds():
    assert [(code, value) for code, value in parse("a.")] == [
        (codes.LITERAL, ord("a")),
        (codes.ANY, None),
    ]


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("[ab]", "IN"),
        ("[^a]", "NOT_LITERAL"),
        ("ab|cd", "BRANCH"),
        ("(a)", "SUBPATTERN"),
        ("a*", "MAX_REPEAT"),
        ("a*?", "MIN_REPEAT"),
        ("(?=a)", "ASSERT"),
        ("(?!a)", "ASSERT_NOT"),
        ("^", "AT"),
    ],
)
def test_re_constants_have_their_names(pattern: str, code: str):
    ((found, *_),) = parse(pattern)
    assert found is getattr(codes, code), f"re._constants.{code}"


def test_a_python_with_its_parser_elsewhere_refuses_patterns_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(python_regex, "_parser", None)
    with pytest.raises(AdapterFileError, match="name the layers plainly"):
        parse("a")
