"""LoRAConfig: fields checked, all faults at once, one plain form, files that come back equal."""

import dataclasses
import json
import math
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import hf_lora
from hf_lora import ConfigError, LoRAConfig

FULL = {
    "targets": ["q_proj", r"mlp\.(up|down)_proj"],
    "exclude": ["layers.0..*"],
    "r": 8,
    "alpha": 12.5,
    "dropout": 0.25,
    "rslora": True,
    "init": "gaussian",
    "overrides": {"down_proj": {"r": 2, "alpha": 3.0}, "up_proj": {"dropout": 0.0}},
    "train": ["score"],
    "dtype": "bfloat16",
}

WRONG = [
    ({"r": 0}, "r: 0 is not a whole number of at least 1"),
    ({"r": -4}, "r: -4"),
    ({"r": 2.0}, "r: 2.0"),
    ({"r": True}, "r: True"),
    ({"r": "8"}, "r: '8'"),
    ({"r": None}, "r: None"),
    ({"alpha": math.nan}, "alpha: nan is not a finite number above 0"),
    ({"alpha": math.inf}, "alpha: inf"),
    ({"alpha": 0}, "alpha: 0"),
    ({"alpha": -1.0}, "alpha: -1.0"),
    ({"alpha": 10**400}, "alpha: 1000"),
    ({"alpha": "1e3"}, "alpha: '1e3'"),
    ({"alpha": 1j}, "alpha: 1j"),
    ({"dropout": 1.0}, r"dropout: 1.0 is not a probability in [0, 1)"),
    ({"dropout": -0.1}, "dropout: -0.1"),
    ({"dropout": math.nan}, "dropout: nan"),
    ({"dropout": False}, "dropout: False"),
    ({"rslora": 1}, "rslora: 1 is not true or false"),
    ({"init": "zeros"}, "init: 'zeros' is not one of kaiming, gaussian"),
    ({"init": ["kaiming"]}, "init: ['kaiming']"),
    ({"dtype": "int8"}, "dtype: 'int8' is not one of float32, bfloat16, float16 or None"),
    ({"dtype": torch.float64}, "dtype: 'float64'"),
    ({"targets": []}, "targets: empty"),
    ({"targets": ""}, "targets: '' is not a pattern"),
    ({"targets": None}, "targets: None is neither a pattern nor a list of patterns"),
    ({"targets": 5}, "targets: 5"),
    ({"targets": ["q_proj", 5]}, "targets: 5 is not a pattern"),
    ({"targets": {"q_proj", 5}}, "targets: 5 is not a pattern"),
    ({"targets": ["q_proj", "("]}, "targets: '(' is not a regular expression"),
    ({"targets": "a)|(b"}, "targets: 'a)|(b' is not a regular expression"),
    ({"targets": "a{1,99999999999999}"}, "is not a regular expression"),
    ({"targets": "(?i)Q_PROJ"}, "write (?i:...) instead"),
    ({"exclude": "*"}, "exclude: '*' is not a regular expression"),
    ({"exclude": {"a": 1}}, "exclude: {'a': 1} is neither"),
    ({"train": ["["]}, "train: '[' is not a regular expression"),
    ({"overrides": ["down_proj"]}, "overrides: ['down_proj'] is not a mapping"),
    ({"overrides": {"x": 4}}, "overrides['x']: 4 is not a mapping of r, alpha or dropout"),
    ({"overrides": {"x": {}}}, "overrides['x']: {} is not a mapping"),
    ({"overrides": {"x": {"r": 0}}}, "overrides['x'].r: 0"),
    ({"overrides": {"x": {"rank": 4}}}, "unknown field 'rank'; known: r, alpha, dropout"),
    ({"overrides": {"(": {"r": 4}}}, "overrides: '(' is not a regular expression"),
    ({"overrides": {7: {"r": 4}}}, "overrides: 7 is not a pattern"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_field_is_named_with_what_it_should_be(fields: dict, words: str):
    with pytest.raises(ConfigError) as caught:
        LoRAConfig(**fields)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_all_wrong_fields_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        LoRAConfig(r=0, alpha=math.nan, dropout=2, init="x", targets=[], overrides={"a": {"r": -1}})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip(" -") for line in lines[1:]] == [
        "targets",
        "r",
        "alpha",
        "dropout",
        "overrides['a'].r",
        "init",
    ]


def test_unknown_fields_list_the_known_ones():
    with pytest.raises(ConfigError, match="lora_r") as caught:
        LoRAConfig.from_dict({"lora_r": 8, "lora_alpha": 16})
    assert "- lora_alpha" in str(caught.value)
    assert "targets, exclude, r, alpha" in str(caught.value)


@pytest.mark.parametrize("fields", [None, ["r"], "r=8", 8])
def test_only_a_mapping_is_a_mapping(fields: object):
    with pytest.raises(ConfigError, match="mapping"):
        LoRAConfig.from_dict(fields)  # type: ignore[arg-type]


def test_it_is_frozen_and_takes_keywords_only():
    config = LoRAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        LoRAConfig("q_proj")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"targets": "q_proj"}, {"targets": ["q_proj"]}),
        ({"targets": ("a", "b")}, {"targets": ["a", "b"]}),
        ({"targets": {"b", "a"}}, {"targets": ["a", "b"]}),
        ({"alpha": 16}, {"alpha": 16.0}),
        ({"alpha": Fraction(1, 2)}, {"alpha": 0.5}),
        ({"r": np.int64(4), "alpha": np.float32(8)}, {"r": 4, "alpha": 8.0}),
        ({"dropout": 0}, {"dropout": 0.0}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"overrides": {"a": {"alpha": 4}}}, {"overrides": {"a": {"alpha": 4.0}}}),
    ],
)
def test_equal_meanings_are_equal_hash_equal_and_are_written_equal(one: dict, other: dict):
    left, right = LoRAConfig(**one), LoRAConfig(**other)
    assert left == right
    assert hash(left) == hash(right)
    assert json.dumps(left.to_dict()) == json.dumps(right.to_dict())


def test_other_meanings_are_not_equal():
    assert LoRAConfig(targets=["a", "b"]) != LoRAConfig(targets=["b", "a"])
    assert LoRAConfig(targets=".*") != LoRAConfig()
    assert len({LoRAConfig(r=1), LoRAConfig(r=2), LoRAConfig(r=1)}) == 2


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json"])
@pytest.mark.parametrize("fields", [{}, FULL], ids=["defaults", "everything"])
def test_files_come_back_equal(tmp_path: Path, name: str, fields: dict):
    config = LoRAConfig(**fields)
    config.to_file(tmp_path / name)
    assert LoRAConfig.from_file(tmp_path / name) == config
    assert LoRAConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_file_written_by_hand_may_leave_fields_out(tmp_path: Path):
    path = tmp_path / "lora.yaml"
    path.write_text("targets: q_proj\nr: 4\noverrides:\n  layers.0..*: {r: 2}\n")
    config = LoRAConfig.from_file(path)
    assert config == LoRAConfig(targets="q_proj", r=4, overrides={"layers.0..*": {"r": 2}})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "r: [", "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"r": 8', "cannot be read"),
        ("a.yaml", "- r", "holds list, not a mapping"),
        ("a.yaml", "", "holds NoneType"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.yaml", "rank: 8", "rank"),
        ("a.toml", "r = 8", "use .yaml, .yml or .json"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, name: str, text: str, words: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        LoRAConfig.from_file(path)
    assert words in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        LoRAConfig.from_file(tmp_path / "missing.yaml")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.json"):
        LoRAConfig.from_file(tmp_path / "binary.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        LoRAConfig().to_file(tmp_path / "no" / "such" / "folder.yaml")


def test_yaml_is_plain_data(tmp_path: Path):
    LoRAConfig(**FULL).to_file(tmp_path / "a.yaml")
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["overrides"] == FULL["overrides"]


def test_a_call_takes_fields_or_a_config_but_not_both():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for wrong in (
        lambda: hf_lora.wrap(model, "0", config=LoRAConfig()),
        lambda: hf_lora.wrap(model, config=LoRAConfig(), r=4),
        lambda: hf_lora.wrap(model, config={"r": 4}),  # type: ignore[arg-type]
        lambda: hf_lora.plan(model, rank=4),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert hf_lora.plan(model, config=LoRAConfig(targets="0", r=2)).config.r == 2
