"""The one meaning of a target: a regular expression for a whole path or a whole tail of it."""

import pytest

from hf_lora.errors import ConfigError
from hf_lora.targets import compile_target, inside, nearest, shortest_names

PATHS = [
    "",
    "model",
    "model.layers.0",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.cross_attn.q_proj",
    "lm_head",
    "q_proj",
]
Q = [path for path in PATHS if path.endswith("q_proj")]

MEANINGS = [
    ("q_proj", Q),
    ("proj", []),  # a tail is whole names, not the end of one
    ("_proj", []),
    (".*_proj", [path for path in PATHS if path.endswith("_proj")]),
    ("self_attn.q_proj", [path for path in Q if "self_attn" in path]),
    (r"self_attn\.(q|v)_proj", [p for p in PATHS if "self_attn" in p]),
    ("attn.q_proj", []),
    (".*attn.q_proj", [path for path in Q if "attn" in path]),
    ("model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
    (r"layers\.0\..*", [path for path in PATHS if path.startswith("model.layers.0.")]),
    (r"layers\.[0-3]\..*q_proj", [p for p in Q if ".0." in p or ".1." in p]),
    ("0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
    ("q_proj|up_proj", [*Q[:1], Q[1], Q[2], "model.layers.0.mlp.up_proj", *Q[3:]]),
    ("lm_head", ["lm_head"]),
    ("^q_proj", ["q_proj"]),  # ^ is the beginning of the path, wherever the tail begins
    ("q_proj$", Q),
    ("(?i:Q_PROJ)", Q),
    (r"(\w)_proj(?<=q_proj)", Q),
    (r"model.layers.(\d)\1?.self_attn.q_proj", Q[:2]),
    ("model", ["model"]),
    (".*", PATHS),
]


@pytest.mark.parametrize(("pattern", "meant"), MEANINGS, ids=[pattern for pattern, _ in MEANINGS])
def test_a_pattern_means_whole_paths_and_whole_tails(pattern: str, meant: list[str]):
    compiled = compile_target(pattern)
    assert [path for path in PATHS if compiled.fullmatch(path)] == [p for p in PATHS if p in meant]


@pytest.mark.parametrize("pattern", ["(", "*", "a)|(b", "[", "(?P<n>", "a{2,1}", "(?i)a"])
def test_what_is_no_regular_expression_is_named(pattern: str):
    with pytest.raises(ConfigError) as caught:
        compile_target(pattern)
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("q_porj", "q_proj"),
        ("self_attn.qproj", "q_proj"),
        ("Q_PROJ", "q_proj"),
        (r"layers\.0\.upproj", "up_proj"),
        ("head", "lm_head"),
    ],
)
def test_a_mistyped_pattern_finds_its_neighbours(pattern: str, found: str):
    assert found in nearest(pattern, PATHS)


def test_nothing_is_near_to_nothing_like_it():
    assert nearest("zzzzzz", PATHS) == []
    assert nearest("q_proj", []) == []


@pytest.mark.parametrize(
    ("path", "parents", "answer"),
    [
        ("a.b.c", {"a.b"}, True),
        ("a.b.c", {"a.b.c"}, True),
        ("a.bc", {"a.b"}, False),
        ("a", {"a.b"}, False),
        ("", {"a"}, False),
        ("a.b", set(), False),
    ],
)
def test_inside_goes_by_whole_names(path: str, parents: set[str], answer: bool):
    assert inside(path, parents) is answer


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        (Q, ["q_proj"]),
        (Q[:2], sorted(Q[:2])),
        ([*Q, "lm_head"], ["lm_head", "q_proj"]),
        (["model.layers.0.mlp.up_proj", Q[0]], [Q[0], "up_proj"]),
        ([], []),
    ],
)
def test_shortest_names_mean_exactly_the_chosen_paths(chosen: list[str], names: list[str]):
    assert shortest_names(chosen, PATHS) == names
    tails = [path for path in PATHS if any(path == n or path.endswith(f".{n}") for n in names)]
    assert sorted(tails) == sorted(chosen)
