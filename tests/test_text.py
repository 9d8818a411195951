"""What is shown of other people's words: printable, of a length that fits a screen."""

import warnings

import pytest

import hf_lora
from hf_lora.text import printable, show, some

NASTY = "\x1b[31mred\x07\r\u202eleft\u2028\ud800\0"


@pytest.mark.parametrize("text", [NASTY, "x" * 10**7, f"{NASTY}\n" * 10**5, NASTY * 10**5])
def test_printable(text: str):
    shown = printable(text)
    assert len(shown) < 5000
    assert shown.replace("\n", "").isprintable()
    assert printable(shown) == shown, "what is wrapped again stays as it is"


def test_what_is_short_and_printable_stays_as_it_is():
    text = "layers.0: expected (2, 8)\n  - größer, 漢字"
    assert printable(text) == text


def test_begin_and_end_of_a_long_line_are_kept():
    shown = printable(f"The folder says {'x' * 9000}; fetch it again")
    assert shown.startswith("The folder says xxx")
    assert shown.endswith("xxx; fetch it again")
    assert "more characters" in shown


def test_lines_are_shortened_each_where_all_are_wanted():
    table = "\n".join(f"row {i}" for i in range(5000))
    assert printable(table, longest=None) == table
    assert len(printable("y" * 10**6, longest=None)) < 3000


@pytest.mark.parametrize(
    "error",
    [
        value
        for value in vars(hf_lora.public).values()
        if isinstance(value, type) and issubclass(value, (hf_lora.HfLoRAError, UserWarning))
    ],
)
def test_every_error_and_warning_is_printable(error: type[Exception]):
    text = str(error(f"{NASTY}{'x' * 10**6}"))
    assert len(text) < 5000
    assert text.isprintable()


def test_a_warning_that_is_given_as_text():
    with pytest.warns(hf_lora.HfLoRAWarning) as told:
        warnings.warn(NASTY * 10**4, hf_lora.HfLoRAWarning, stacklevel=1)
    assert str(told[0].message).isprintable()


def test_names_are_shown_in_short_and_counted():
    assert some(["a", "b"]) == "'a', 'b'"
    assert some(map(str, range(1000))) == "'0', '1', '2', '3', '4' and 995 more"
    assert len(show("z" * 10**6)) < 130
