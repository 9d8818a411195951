"""Patterns and sizes meant to take forever: a load ends soon, whatever it says.

What it does is counted: a clock would say what else the machine does.
"""

import json
import random
import re
import resource
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from hf_lora.files.bounded_regex import Budget, Pattern, Text
from hf_lora.files.patterns import LayerIndex, PatternMap, TailIndex
from tests import tiny
from tests.files import edit
from tests.tiny import Net
from tests.work import calls

CALLS = 5_000_000
"""Of functions: for the million steps that all patterns of a file may take, and the rest."""
MEGABYTES = 500
LAYERS = 40

BOMBS = [
    r"(a|a)*b",
    r"(.*)*x",
    r"((((.*)*)*)*)*x",
    r"(.*.*.*.*.*.*.*.*.*)x",
    # what took 11 GB of the package `regex`, whose matching was stopped after half a second
    r"(?:(?:(?:.?){65535}){65535}){65535}x",
    r"(?:(?:(?:){65535}){65535}){65535}x",
    r"(?:x{0,30000}){0,30000}" * 100,
    r"(?:.{0,4294967294}){0,4294967294}x",
    "(?:" + r"(?:.?)*" * 300 + ")*x",
    "(?=(?:.*.*)*(?=(?:.*.*)*(?=(?:.*.*)*x)))" * 20,
    "(?!" * 300 + ".*" + ")" * 300 + "x",
    "(?<!" + "." * 60000 + ")x",
    "(?:" * 5000 + ")" * 5000,
    "(" * 5000,
    "(?:.|" * 300 + ")" * 300 + "x",
    "|".join(["a.*b.*c"] * 5000),
    "[!-\uffff]" * 5000,
    "(?i:[\0-\U0010ffff])" * 1000,
    r"(.*)\1\1\1x",
    r"(?>.*)*x",
    "x" * 1_000_000,
    "(a)" * 300_000,
]


def bounded_load(directory: Path, model: Net, most: int = CALLS) -> str | None:
    """Load, and return the error's message or None; check work and memory."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = None

    def load() -> None:
        nonlocal message
        try:
            hf_lora.load(model, directory)
        except hf_lora.AdapterFileError as error:
            message = str(error)

    assert calls(load) < most
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < MEGABYTES
    return message


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A PEFT folder for a model of 80 layers, so that every pattern meets many names."""
    folder = tmp_path_factory.mktemp("large")
    tiny.saved(folder, layers=LAYERS)
    edit.as_pefts(folder)
    return folder, edit.read_config(folder)


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers"])
def test_a_pattern(large: tuple[Path, dict[str, Any]], field: str, bomb: str):
    folder, config = large
    fields = {
        "target_modules": {"target_modules": bomb},
        "exclude_modules": {"exclude_modules": bomb},
        "rank_pattern": {"rank_pattern": {bomb: 2}, "alpha_pattern": {bomb: 4}},
        "layers": {"layers_to_transform": list(range(LAYERS)), "layers_pattern": [bomb]},
    }[field]
    edit.write_config(folder, config | fields)
    message = bounded_load(folder, Net(LAYERS))
    # the pattern that means nothing is the only one that may be harmless
    assert message is not None or field in ("exclude_modules", "rank_pattern")


@pytest.mark.parametrize(
    "patterns",
    [
        {f"name{n}": 2 for n in range(50_000)},
        {f"layers.{n}.q_proj": 2 for n in range(50_000)},
        {f".*name{n}.*": 2 for n in range(50_000)},
        {f"{n}|(.*)*x": 2 for n in range(1_000)},
        {"x" * n: 2 for n in range(1, 5_000)},
    ],
    ids=range(5),
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "saved"])
def test_many_patterns(large: tuple[Path, dict[str, Any]], field: str, patterns: dict[str, int]):
    folder, config = large
    value: Any = patterns if field.endswith("pattern") else [*patterns, "q_proj", "v_proj"]
    edit.write_config(folder, config | {"modules_to_save" if field == "saved" else field: value})
    message = bounded_load(folder, Net(LAYERS))
    assert message is not None or field in ("target_modules", "rank_pattern", "alpha_pattern")


@pytest.mark.parametrize("name", ["a" * 400, "a." * 200 + "a", "_orig_mod." * 40, "module." * 50])
def test_many_names_that_take_long_to_look_at(tmp_path: Path, name: str):
    tensors = {f"{name}{n}.lora_{w}.weight": torch.ones(1, 1) for n in range(2_000) for w in "AB"}
    edit.write_tensors(tmp_path, tensors, {})
    edit.write_config(
        tmp_path,
        {
            "peft_type": "LORA",
            "r": 1,
            "target_modules": "(a|a)*b",
            "rank_pattern": {"(a|a)*b": 1, "(.*)*x": 2},
            "modules_to_save": ["a", "a" * 99],
        },
    )
    assert bounded_load(tmp_path, Net()) is not None


@pytest.mark.parametrize("name", ["a{}", "base_model.model." + "b." * 20 + "{}.lora_A.weight"])
def test_as_many_tensors_as_a_file_may_have(tmp_path: Path, name: str):
    """A file of many megabytes takes its time, in proportion, and no more than that."""
    tiny.saved(tmp_path)
    edit.change_config(tmp_path, target_modules="(a|a)*b", rank_pattern={"(.*)*x": 2})
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    edit.write_header(tmp_path, {name.format(n): entry for n in range(100_000)}, b"")
    assert bounded_load(tmp_path, Net(), most=100 * 100_000) is not None


def test_many_names_that_are_no_factors(tmp_path: Path):
    tiny.saved(tmp_path)
    more = {f"{'b.' * 100}{n}": torch.ones(1) for n in range(10_000)}
    edit.change_tensors(tmp_path, lambda tensors: tensors.update(more))
    edit.change_config(tmp_path, modules_to_save=[f"b.{n}" for n in range(10_000)])
    assert bounded_load(tmp_path, Net()) is not None


def test_the_budget_is_one_for_the_whole_file(tmp_path: Path):
    """Each pattern alone would pass; from_pretrained's second look starts with a new budget."""
    pattern = Pattern("(?:(?:.?)*)*x", patience := Budget("file"))
    texts = (Text("q" * n, patience) for n in range(100_000))
    with pytest.raises(hf_lora.AdapterFileError, match="file: matching its patterns takes too"):
        any(pattern.fullmatch(text) for text in texts)


PIECES = [
    *("a", "b", "c", ".", r"\.", r"\d", r"\w", r"\W", r"[ab]", r"[^a]", r"[a-c\d]", r"\b", r"\B"),
    *("^", "$", "", "ab", "a|b", "(a|bc)", "(?:a|)", "(?=a)", "(?!b)", "(?<=a)", "(?<!ab)"),
    *("1", "10", "x.1", "(?:ab|a)(?:c|)", "(?!)", r"\A", r"\Z", r"[\d.]"),
]
SUFFIXES = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,3}", "{2,}", "*?", "+?", "??"]


def random_pattern(random_: random.Random, depth: int = 0) -> str:
    parts = []
    for _ in range(random_.randint(1, 4)):
        piece = random_.choice(PIECES)
        if depth < 1 and random_.random() < 0.3:
            piece = random_pattern(random_, depth + 1)
        suffix = random_.choice(SUFFIXES)
        parts.append(f"(?:{piece}){suffix}" if suffix else piece)
    return random_.choice(["", "", "|"]).join(parts)


def test_patterns_mean_what_they_mean_to_python():
    """3,000 random patterns on random texts, against the standard library."""
    random_ = random.Random(1)
    matched = 0
    for _ in range(3_000):
        pattern = random_pattern(random_)
        text = "".join(random_.choice("aabbc.1") for _ in range(random_.randint(1, 6)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = re.fullmatch(pattern, text) is not None
            tail = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", text) is not None
        patience = Budget("test")
        ours = Pattern(pattern, patience)
        assert ours.fullmatch(Text(text, patience)) == expected, (pattern, text)
        assert ours.matches_tail(Text(text, patience)) == tail, (pattern, text)
        matched += expected
    assert 300 < matched < 2_700


@pytest.mark.parametrize(
    "pattern",
    [
        r"layers\.\d+\.q",
        r"layers\.(?:[0-9]|1[0-9]|2[0-7])\.q",
        r"layers\.(1|12|21)\.\w+",
        r".*[13579]\.q",
        r"layers\.(?!7)[^5]+\.q",
        r".*(?<=11)\.q",
        r"layers\.([02468])?\d\.q",
        ".*[\u0660-\u0669]+.*",
    ],
)
def test_numbers_are_told_apart_where_the_pattern_does(pattern: str):
    """One Pattern remembers what it answered for names that differ in digits it does not tell."""
    ours, patience = Pattern(pattern, Budget("test")), Budget("test")
    for number in [*range(300), "\u0663", "1\u0663"]:
        text = f"layers.{number}.q"
        expected = re.fullmatch(pattern, text) is not None
        assert ours.fullmatch(Text(text, patience)) == expected, text


def test_a_mixture_of_experts_is_no_bomb():
    """36,096 layers, and a pattern with many choices and digits of its own."""
    words = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
    pattern = rf"(?:.*?(?:language|text).*?(?:{words}).*?(?:fc1|fc2|up_proj))|(?:.*\.(?:{words}).*)"
    patience = Budget("test")
    ours = Pattern(pattern, patience)
    names = (
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj"
        for layer in range(94)
        for expert in range(128)
        for kind in ("gate", "up", "down")
    )
    assert all(ours.fullmatch(Text(name, patience)) for name in names)


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?>a)b", "a*+", "(?i)a", "(?(1)a|b)", "(?s-i:a)"])
def test_what_cannot_be_matched_safely_is_refused(pattern: str):
    with pytest.raises(hf_lora.AdapterFileError, match="not a regular expression that can be"):
        Pattern(pattern, Budget("test"))


def test_names_are_looked_up_as_peft_compares_them():
    """The fast look-ups against PEFT's own loops, on names that overlap in every way."""
    random_ = random.Random(2)
    words = ["q", "v", "layers", "layers.0", "0", "0.q", "1", "attn.q", "layers.0.attn.q", "h"]
    for _ in range(2_000):
        path = ".".join(random_.choice(words) for _ in range(random_.randint(1, 5)))
        names = random_.sample(words, random_.randint(1, 5))
        assert TailIndex(names).means(path) == (
            path in names or any(path.endswith(f".{name}") for name in names)
        )
        values = {name: n for n, name in enumerate(names)}
        first = next((v for k, v in values.items() if re.match(rf"(.*\.)?({k})$", path)), -1)
        assert PatternMap(values, Budget("test")).get(path, -1) == first

        for given in ([], random_.sample(["layers", "h", "attn", r"[lh].*", "layers.0"], 2)):
            number = peft_layer(path, given)
            means = LayerIndex([0], given, Budget("test")).means(path)
            assert means == (number == 0), (path, given)


def peft_layer(path: str, patterns: list[str]) -> int | None:
    """Return the number of the layer that PEFT 0.21 sees in ``path`` (tuners_utils.py)."""
    match = None
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path)
        if match is not None:
            break
    return int(match["idx"]) if match else None


def test_a_large_honest_configuration_is_quick(tmp_path: Path):
    """600 layers, each with a rank pattern of its own, and a regex for the targets."""
    tiny.saved(tmp_path, layers=300)
    names = [f"layers.{n}.{p}" for n in range(300) for p in ("q_proj", "v_proj")]
    edit.as_pefts(
        tmp_path,
        target_modules=r"layers\.\d+\.(q|v)_proj",
        rank_pattern=dict.fromkeys(names, 2) | {r".*layers\.\d+\.v_proj": 2},
        alpha_pattern={rf".*\.{n}\.(q|v)_proj": 4 for n in range(10)},
        r=1,
    )
    assert bounded_load(tmp_path, Net(300)) is None


def test_json_is_read_once(tmp_path: Path):
    """The JSON that a note of a killed save holds is bounded like any other."""
    tiny.saved(tmp_path)
    (tmp_path / ".adapter_config.json.pending").write_text(json.dumps(["x"] * 3_000_000))
    assert bounded_load(tmp_path, Net()) is None
