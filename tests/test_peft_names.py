"""PEFT's configurations mean here what they mean to PEFT, and its names are told ours."""

import random
from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import ConfigError, LoRAConfig
from hf_lora.peft_names import CALLS, FIELDS
from tests import tiny

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "v_proj")})
        self.ff = nn.ModuleDict({"q": nn.Linear(8, 8), "mlp": nn.Linear(8, 8)})
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])


class Stack(nn.Module):
    """Numbers below numbers, names that end alike, a layer at the top, and two lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.model = nn.ModuleDict(
            {name: nn.ModuleList([Block() for _ in range(3)]) for name in ("layers", "h")}
        )
        self.pre_head, self.head = nn.Linear(8, 8), nn.Linear(8, 8)


def adapted(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scale of each layer that PEFT has adapted."""
    return {
        name.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for name, m in model.named_modules()
        if hasattr(m, "lora_A")
    }


def trained(model: nn.Module) -> set[str]:
    """The paths of the modules that PEFT trains in full."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
    }


def assert_alike(**fields: Any) -> LoRAConfig:
    config = peft.LoraConfig(**fields)
    ours = LoRAConfig.from_peft(config)
    plan = hf_lora.plan(Stack(), config)
    assert not plan.problems, plan.problems
    theirs = peft.get_peft_model(Stack(), config)
    assert {t.path: (t.slot.r, t.slot.scaling) for t in plan.targets} == adapted(theirs)
    assert {item.path for item in plan.trained} == trained(theirs)
    return ours


NAMES = ["q_proj", "v_proj", "ff.q", "mlp", "experts.0", "experts.1", "head"]
BLOCKS = [None, 0, [1], [0, 2], [2, 1]]
PATTERNS = [None, "layers", ["h"], ["layers", "h"], "model.h", ["h", "layers"]]


@pytest.mark.parametrize("seed", range(40))
def test_it_adapts_what_peft_adapts(seed: int):
    """Random choices of layers, blocks, ranks and strengths, by names that are tails of others."""
    chosen = random.Random(seed)
    fields: dict[str, Any] = {
        "target_modules": chosen.sample(NAMES, chosen.randint(1, 4)),
        "r": chosen.choice([1, 2, 8]),
        "lora_alpha": chosen.choice([1, 8, 12.5]),
        "use_rslora": chosen.random() < 0.3,
        "layers_to_transform": chosen.choice(BLOCKS),
    }
    if fields["layers_to_transform"] is not None:
        fields["layers_pattern"] = chosen.choice(PATTERNS)
    try:
        there = adapted(peft.get_peft_model(Stack(), peft.LoraConfig(**fields)))
    except ValueError:
        assert hf_lora.plan(
            Stack(), peft.LoraConfig(**fields)
        ).problems  # no layer is found here, too
        return
    found = [name for name in fields["target_modules"] if any(_means(name, path) for path in there)]
    fields["target_modules"] = found
    tails = sorted({path.split(".", 3)[-1] for path in there} | set(found) | set(there))
    tails = [tail for tail in tails if any(_means(tail, path) for path in there)]
    ranks = {name: chosen.randint(1, 8) for name in chosen.sample(tails, min(2, len(tails)))}
    alphas = {name: chosen.randint(1, 9) for name in chosen.sample(tails, min(2, len(tails)))}
    for pattern, others in ((ranks, alphas), (alphas, ranks)):
        # an entry that another one hides on all layers is an error here, and nothing to PEFT
        for name in list(pattern):
            if any(_means(one, name) for one in [*pattern, *others] if one != name):
                del pattern[name]
    assert_alike(**fields, rank_pattern=ranks, alpha_pattern=alphas)


def _means(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"model\.layers\.[01]\..*q_proj"},
        {"target_modules": "q_proj"},  # the whole path, so the layer at the top alone
        {"target_modules": ["mlp"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "exclude_modules": ["attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj"], "modules_to_save": ["head"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.\d\.attn\.q_proj": 3}},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"h\.\d.*": 2, "v_proj": 3},
            "alpha_pattern": {r"h\.\d.*": 7, "v_proj": 5},
        },
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"attn.q_proj": 2},
            "alpha_pattern": {"q_proj": 5, "layers.0.attn.v_proj": 1},
        },
    ],
)
def test_each_way_to_say_it(fields: dict[str, Any]):
    ours = assert_alike(**fields)
    assert ours.dropout == fields.get("lora_dropout", 0.0)


def test_all_linear_is_told_from_the_structure():
    """Not by its own name: what PEFT says is a word here, too."""
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    theirs = peft.get_peft_model(Stack(), config)
    ours = hf_lora.plan(Stack(), config)
    assert {target.path for target in ours.targets} == adapted(theirs).keys()


def test_by_position_by_name_and_from_a_file():
    theirs = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"])
    ours = LoRAConfig(r=4, alpha=6, targets=["q_proj"])
    assert LoRAConfig.from_peft(theirs) == LoRAConfig.from_peft(theirs.to_dict()) == ours
    for given in (theirs, ours):
        model = hf_lora.wrap(tiny.Net(), given)
        hf_lora.add_adapter(model, "second", given)
        hf_lora.add_adapter(model, "third", config=given)
        assert set(map(str, hf_lora.adapters(model).values())) == {str(ours)}


def test_what_a_file_leaves_out_has_pefts_value():
    ours = LoRAConfig.from_peft({"target_modules": ["q_proj"]})
    theirs = peft.LoraConfig(target_modules=["q_proj"])
    assert (ours.r, ours.alpha) == (theirs.r, theirs.lora_alpha)


def test_an_adapter_with_such_patterns_is_saved_and_opened(tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"
    )
    model = hf_lora.wrap(tiny.Net(), config)
    tiny.scramble(model)
    hf_lora.save(model, tmp_path)
    again = hf_lora.load(tiny.Net(), tmp_path)
    assert torch.equal(tiny.answers(again), tiny.answers(model))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"use_dora": True, "target_modules": ["q"]}, "use_dora = True"),
        ({"init_lora_weights": "pissa", "target_modules": ["q"]}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": False, "target_modules": ["q"]}, "init_lora_weights = False"),
        ({}, "target_modules is not given"),
        (
            {
                "target_modules": ["q"],
                "rank_pattern": {"a.*": 2},
                "alpha_pattern": {"b": 3},
            },
            "rank_pattern and alpha_pattern have different expressions",
        ),
    ],
)
def test_what_has_no_equal_is_refused_by_name(fields: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        LoRAConfig.from_peft(peft.LoraConfig(**fields))


def test_all_that_has_no_equal_is_told_at_once():
    config = peft.LoraConfig(use_dora=True, init_lora_weights="olora")
    with pytest.raises(ConfigError) as told:
        hf_lora.wrap(tiny.Net(), config)
    assert str(told.value).count("\n  - ") == 3


def test_other_methods_and_other_things_are_refused():
    with pytest.raises(ConfigError, match="peft_type is 'IA3'"):
        LoRAConfig.from_peft(peft.IA3Config(target_modules=["q"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match="neither PEFT's LoraConfig nor its fields"):
        LoRAConfig.from_peft("q_proj")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Two configurations"):
        hf_lora.wrap(tiny.Net(), LoRAConfig(), config=LoRAConfig())
    with pytest.raises(ConfigError, match=r"not both \(r\)"):
        hf_lora.wrap(tiny.Net(), LoRAConfig(), r=4)


@pytest.mark.parametrize("make", [LoRAConfig, lambda **f: LoRAConfig.from_dict(f)])
def test_a_name_of_pefts_is_told_ours(make: Any):
    with pytest.raises(ConfigError) as told:
        make(lora_alpha=8, target_modules=["q"], made_up=1)
    lines = str(told.value).splitlines()
    assert lines[1:4] == [
        "  - lora_alpha (here: alpha)",
        "  - target_modules (here: targets)",
        "  - made_up",
    ]
    with pytest.raises(ConfigError, match=r"lora_dropout \(here: dropout\)"):
        hf_lora.wrap(tiny.Net(), "q_proj", lora_dropout=0.1)


def test_a_function_of_pefts_is_told_ours():
    with pytest.raises(AttributeError, match=r"here: wrap\(model, targets"):
        _ = hf_lora.get_peft_model
    assert not hasattr(hf_lora, "LoraConfig")


def test_the_names_are_pefts_and_what_is_named_is_there():
    config = {*vars(peft.LoraConfig()), "adapter_name", "autocast_adapter_dtype"}
    config |= {"low_cpu_mem_usage", "rank", "lora_r"}
    assert set(FIELDS) <= config
    methods = set(dir(peft.PeftModel)) | set(dir(peft.LoraModel)) | set(dir(peft))
    assert set(CALLS) <= methods
    known = {
        *hf_lora.__all__,
        *vars(LoRAConfig()),
        "adapter",
        "model",
        "nothing",
        "print",
        "trainable",
    }
    for here in {*FIELDS.values(), *CALLS.values()}:
        assert here.replace(":", "").replace(",", "").split("(")[0].split()[0] in known


def test_biases_mean_here_what_they_mean_there():
    config = peft.LoraConfig(target_modules=["q_proj"], bias="lora_only", lora_bias=True)
    ours = hf_lora.LoRAConfig.from_peft(config)
    assert (ours.bias, ours.lora_bias) == ("lora_only", True)


def test_rows_are_trained_in_the_modules_that_peft_takes():
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"head": [1, 2]})
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in peft.get_peft_model(Stack(), config).named_modules()
        if hasattr(module, "token_adapter")
    }
    found = hf_lora.plan(Stack(), config).rows
    assert {rows.path for rows in found} == theirs == {"head", "pre_head"}
    assert {rows.ids for rows in found} == {(1, 2)}
    alone = {"target_modules": "dummy-target-modules", "trainable_token_indices": {"head": [1]}}
    assert LoRAConfig.from_peft(peft.LoraConfig(**alone)).targets == ()
    with pytest.raises(ConfigError, match="is for the model's input embeddings"):
        LoRAConfig.from_peft(
            peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
        )
