"""Several adapters on one model: added, deleted, activated, frozen; each with layers of its own."""

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import ConfigError, StateError, TargetError, UnknownAdapterError
from hf_lora.model.registry import registry_of
from tests.rounding import assert_rounded_alike
from tests.snapshot import low_rank, snapshot
from tests.tiny import Net, answers, rows, scramble

Q, V = "q_proj", "v_proj"


def two() -> Net:
    """Return a model with a default adapter on q and one called fr on q and v, of another rank."""
    model = Net()
    hf_lora.wrap(model, Q, r=2, alpha=4)
    hf_lora.add_adapter(model, "fr", [Q, V], r=3, alpha=3, overrides={V: {"r": 1}})
    scramble(model)
    return model


def by_hand(names: list[str], model: Net) -> torch.Tensor:
    """Return the answer of a plain model whose weights hold these adapters' updates, in float64."""
    plain = Net().double()
    registry = registry_of(model)
    for path, layer in low_rank(registry).items():
        weight = plain.get_submodule(path).weight
        for name in names:
            if name in layer.lora_slots:
                a, b = (factor.detach().double() for factor in layer.lora_pair(name))
                weight.data += layer.lora_slots[name].scaling * b @ a
    return plain(rows().double()).detach()


def plainly(model: Net) -> torch.Tensor:
    """Return the answer by the plain path."""
    routing = registry_of(model).routing
    routing.plain = True
    try:
        return answers(model)
    finally:
        routing.plain = False


@pytest.mark.parametrize("names", [[], ["default"], ["fr"], ["default", "fr"], ["fr", "default"]])
def test_active_adapters_are_added_up(names: list[str]):
    model = two()
    hf_lora.activate(model, names)
    assert hf_lora.active_adapters(model) == tuple(names)
    assert torch.allclose(answers(model).double(), by_hand(names, model), atol=1e-5)


def test_a_new_adapter_is_there_but_not_active():
    model = hf_lora.wrap(Net(), Q, r=2)
    scramble(model)
    before = answers(model)
    hf_lora.add_adapter(model, "fr", V, r=1)
    assert torch.equal(answers(model), before)
    assert list(hf_lora.adapters(model)) == ["default", "fr"]
    assert hf_lora.adapters(model)["fr"].targets == (V,)
    assert hf_lora.active_adapters(model) == ("default",)
    hf_lora.add_adapter(model, "cold", V, r=1, trainable=False)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(name.endswith("_cold") for name in trains)
    assert sum(name.endswith("_fr") for name in trains) == 4


def test_ranks_and_layers_differ_between_adapters():
    model = two()
    registry = registry_of(model)
    layer = low_rank(registry)["layers.0.q_proj"]
    assert layer.lora_A.shape == (2, 8)
    assert layer.lora_A_fr.shape == (3, 8)
    assert set(low_rank(registry)["layers.0.v_proj"].lora_slots) == {"fr"}
    assert low_rank(registry)["layers.0.v_proj"].lora_A_fr.shape == (1, 8)
    assert not hasattr(low_rank(registry)["layers.0.v_proj"], "lora_A")


def test_deleting_an_adapter_gives_layers_back_that_no_other_uses():
    plain = Net()
    before = snapshot(plain)
    model = plain
    hf_lora.wrap(model, Q, r=2)
    alone = snapshot(model)
    hf_lora.add_adapter(model, "fr", [Q, V], r=3, train=["head"])
    scramble(model)
    expected = by_hand(["default"], model)
    hf_lora.activate(model, ["fr", "default"])
    hf_lora.delete_adapter(model, "fr")
    assert hf_lora.active_adapters(model) == ("default",)
    assert type(model.layers[0].v_proj) is nn.Linear
    assert type(model.head) is nn.Linear
    assert torch.allclose(answers(model).double(), expected, atol=1e-5)
    after = snapshot(model)
    assert after.modules == alone.modules
    assert after.keys == alone.keys
    assert [p[:3] for p in after.parameters] == [p[:3] for p in alone.parameters]
    hf_lora.unwrap(model)
    assert snapshot(model) == before


def test_deleting_the_first_adapter_leaves_the_second():
    model = two()
    expected = by_hand(["fr"], model)
    hf_lora.activate(model, "fr")
    hf_lora.delete_adapter(model, "default")
    assert torch.allclose(answers(model).double(), expected, atol=1e-5)
    assert not any(key.endswith(("lora_A", "lora_B")) for key in model.state_dict())
    with pytest.raises(StateError, match="'fr' is the last adapter"):
        hf_lora.delete_adapter(model, "fr")
    hf_lora.add_adapter(model, "default", V, r=1)
    assert list(hf_lora.adapters(model)) == ["fr", "default"]


LOOKALIKES = ["A", "B", "lora", "lora_A", "B_x", "x", "default2", "default_", "weight", "bias", "0"]


def test_names_that_look_like_parts_of_parameters_are_just_names():
    model = hf_lora.wrap(Net(), Q, r=2, adapter="A_x")
    for name in LOOKALIKES:
        hf_lora.add_adapter(model, name, [Q, V], r=1)
    hf_lora.add_adapter(model, "default", Q, r=1)
    scramble(model)
    names = ["A_x", *LOOKALIKES, "default"]
    found, trials = {}, []
    for name in names:
        with hf_lora.use_adapter(model, name):
            found[name] = answers(model)
            trials.append((found[name], plainly(model), by_hand([name], model)))
    assert_rounded_alike(*trials)
    keys = {name: {key for *_, key in registry_of(model).keys(name)} for name in names}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))
    for name in names[:-1]:
        before = {other: found[other] for other in hf_lora.adapters(model) if other != name}
        hf_lora.activate(model, [])
        hf_lora.delete_adapter(model, name)
        for other, expected in before.items():
            with hf_lora.use_adapter(model, other):
                assert torch.equal(answers(model), expected), (name, other)
    assert {key for key in model.state_dict() if "lora" in key} == keys["default"]


@pytest.mark.parametrize(
    "name",
    ["", "a.b", "a/b", "../x", "-a", "_a", "a b", "é", "a\n", "x" * 65, None, 3, b"a", ("a",)],
)
def test_names_that_reach_somewhere_else_are_refused(name: object):
    model = Net()
    with pytest.raises(ConfigError, match="An adapter cannot be called"):
        hf_lora.wrap(model, Q, r=2, adapter=name)  # type: ignore[arg-type]
    assert type(model.layers[0].q_proj) is nn.Linear
    hf_lora.wrap(model, Q, r=2)
    with pytest.raises(ConfigError, match="An adapter cannot be called"):
        hf_lora.add_adapter(model, name, Q, r=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nope", "Default", "", None, 3, ["fr", "nope"]])
def test_an_unknown_name_lists_the_known_and_changes_nothing(name: object):
    model = two()
    before = snapshot(model)
    verbs = [hf_lora.activate, hf_lora.use_adapter, hf_lora.freeze, hf_lora.unfreeze, hf_lora.merge]
    if isinstance(name, str):
        verbs.append(hf_lora.delete_adapter)
    if name is None:
        verbs.remove(hf_lora.merge)  # there it means the active ones
    for verb in verbs:
        with pytest.raises(UnknownAdapterError, match="it has: 'default', 'fr'") as caught:
            verb(model, name)  # type: ignore[operator]
        assert isinstance(caught.value, LookupError)
    assert hf_lora.active_adapters(model) == ("default",)
    assert snapshot(model) == before


def test_a_name_that_is_taken_is_refused():
    model = two()
    before = snapshot(model)
    with pytest.raises(StateError, match="has an adapter 'fr' already"):
        hf_lora.add_adapter(model, "fr", Q, r=2)
    with pytest.raises(TargetError, match="matches no module"):
        hf_lora.add_adapter(model, "x", "zzz", r=2)
    with pytest.raises(TargetError, match="larger than the layer"):
        hf_lora.add_adapter(model, "x", Q, r=99)
    assert snapshot(model) == before
    assert list(hf_lora.adapters(model)) == ["default", "fr"]


def test_what_an_unwrapped_model_answers():
    model = Net()
    for verb in (
        hf_lora.adapters,
        hf_lora.active_adapters,
        lambda m: hf_lora.add_adapter(m, "x", Q),
        lambda m: hf_lora.delete_adapter(m, "x"),
        lambda m: hf_lora.activate(m, "x"),
        lambda m: hf_lora.use_adapter(m, "x"),
        hf_lora.no_adapter,
        lambda m: hf_lora.freeze(m, "x"),
        hf_lora.merge,
        hf_lora.unmerge,
        hf_lora.merge_and_unwrap,
        hf_lora.unwrap,
        hf_lora.summary,
    ):
        with pytest.raises(StateError, match="This Net is not wrapped"):
            verb(model)


def test_a_layer_that_was_replaced_is_noticed_before_more_is_built_on_it():
    model = two()
    model.layers[0].q_proj = nn.Linear(8, 8)
    for verb in (lambda: hf_lora.add_adapter(model, "x", Q, r=1), lambda: hf_lora.merge(model)):
        with pytest.raises(StateError, match=r"layers\.0\.q_proj is no longer part of the model"):
            verb()
    other = two()
    other.layers[0].v_proj.weight = nn.Parameter(torch.zeros(20, 8))
    other.layers[0].v_proj.out_features = 20
    with pytest.raises(StateError, match="has other sizes now"):
        hf_lora.merge(other, "fr")
    hf_lora.unwrap(model)
    hf_lora.unwrap(other)
    assert type(other.layers[0].v_proj) is nn.Linear
