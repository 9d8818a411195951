"""What is shown of other people's words: printable, of a length that fits a screen."""

import warnings

import pytest

import hf_lora
from hf_lora.errors import listing
from hf_lora.text import by_number, grouped, printable, show, some, wrapped

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


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([f"h.{n}.fc: gone" for n in range(12)], ["h.{0-11}.fc: gone"]),
        ([f"h.{n}.fc: gone" for n in (10, 0, 1, 2, 7)], ["h.{0-2,7,10}.fc: gone"]),
        # few lines stay as they are, and so do those that say something else
        ([f"h.{n}.fc: gone" for n in range(3)], [f"h.{n}.fc: gone" for n in range(3)]),
        ([f"h.{n}.fc: {n} bad" for n in range(9)], [f"h.{n}.fc: {n} bad" for n in range(9)]),
        # the same number twice in a line, and every number with every other
        ([f"h.{n}.a: not b.{n}.c" for n in range(5)], ["h.{0-4}.a: not b.{0-4}.c"]),
        (
            [f"h.{n}.e.{m}.w: odd" for n in range(4) for m in range(8)],
            ["h.{0-3}.e.{0-7}.w: odd"],
        ),
        # where some pairs are missing, one line for all would say too much
        ([f"h.{n}.e.{m}.w: odd" for n in range(4) for m in range(n + 1)], None),
        (["a", "b", *(f"h.{n}.x: y" for n in range(4)), "c"], ["a", "b", "h.{0-3}.x: y", "c"]),
        ([], []),
    ],
)
def test_lines_that_differ_in_a_layer_are_one(lines: list[str], expected: list[str] | None):
    assert grouped(lines) == (lines if expected is None else expected)


def test_an_error_names_each_kind_of_layer_once():
    told = listing("It failed", (f"h.{n}.{m}: gone" for n in range(200) for m in ("a", "b")))
    assert told.splitlines() == ["It failed:", "  - h.{0-199}.a: gone", "  - h.{0-199}.b: gone"]


def test_paths_by_their_numbers():
    paths = ["h.10.a", "h.2.a", "h", "a.b", "h.x", "0", "10", "9"]
    assert sorted(paths, key=by_number) == ["0", "9", "10", "a.b", "h", "h.2.a", "h.10.a", "h.x"]


def test_lines_end_between_words():
    text = "  - a path: " + "word " * 20 + "\n| table   row |"
    shown = wrapped(text, 40).split("\n")
    assert max(map(len, shown)) <= 40
    assert shown[-1] == "| table   row |"
    assert " ".join(" ".join(shown[:-1]).split()) == text.split("\n")[0].strip()
    assert all(line.startswith("      ") for line in shown[1:-1])
    assert wrapped("x" * 100, 40) == "x" * 100
