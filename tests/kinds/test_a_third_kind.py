"""A kind of layer that the package has never heard of: one class, registered, is all that it takes.

It adapts an embedding by a shift of each of its columns, with tensors, shapes and names of its own.
Everything that works on whole models must go by what that class says.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

import hf_lora
from hf_lora.adapter_io.describe import describe
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.hub.card.card import adapter_card
from hf_lora.layers.choice import Weights
from hf_lora.layers.kind import Adaptable
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import parameter_name
from hf_lora.layers.replaced import Replaced, Tensors, in_place_of
from hf_lora.layers.roles import Group, Layout, Role, Shapes
from hf_lora.model.registry import registry_of

LEFT, RIGHT = "toy_left", "toy_right"
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def _shift(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> torch.Tensor:
    """Return what is added to each row, (width,): the sum of r products."""
    return config.scaling * (tensors[LEFT] * tensors[RIGHT]).sum(0)


TOY = Layout(
    roles=(LEFT, RIGHT),
    fault=lambda s: None if s[LEFT] == s[RIGHT] else f"has {s[LEFT]} and {s[RIGHT]}",
    rank=lambda shapes: shapes[LEFT][0],
    norm=lambda tensors, config: float(_shift(tensors, config).detach().double().norm()),
)


class Shifted(Adaptable):
    """Adds the same vector to every row of an embedding."""

    lora_prefix = "Shifted"
    lora_layout = TOY

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys((LEFT, RIGHT), (config.r, host.embedding_dim))  # type: ignore[dict-item]

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        width = shapes[LEFT][1]
        return None if width == host.embedding_dim else f"{width} columns, not {host.embedding_dim}"

    def lora_add(
        self,
        adapter: str,
        config: LayerConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        init: str | None,
    ) -> None:
        for role, shape in self.lora_shapes(self, config).items():
            start = torch.zeros if role == RIGHT else torch.ones
            held = parameter_name(role, adapter)
            setattr(self, held, nn.Parameter(start(shape, dtype=dtype, device=device)))
        self.lora_slots[adapter] = config
        self.lora_routing.names.add(adapter)

    def lora_remove(self, adapter: str) -> None:
        del self.lora_slots[adapter]
        for role in (LEFT, RIGHT):
            delattr(self, parameter_name(role, adapter))

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        shapes = self.lora_shapes(self, self.lora_slots[adapter])
        groups = Group(7, LEFT), Group(8, RIGHT, fast=True)
        return tuple(
            Role(role, parameter_name(role, adapter), shapes[role], TOY.key(role), group)
            for role, group in zip((LEFT, RIGHT), groups, strict=True)
        )

    def lora_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        return {role: getattr(self, parameter_name(role, adapter)) for role in (LEFT, RIGHT)}

    def lora_is_at_start(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        return not tensors[RIGHT].any()

    def lora_merge_fault(self) -> str | None:
        return None

    def _total(self, weights: Weights) -> torch.Tensor | float:
        return sum(
            factor * _shift(self.lora_tensors(name), self.lora_slots[name])
            for name, factor in weights
            if name in self.lora_slots
        )

    @torch.no_grad()
    def lora_merged(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        weight: Any = self.weight
        before = None if replaced is None else replaced.read("weight")
        start = weight if before is None else before
        return {"weight": in_place_of(weight, start + self._total(adapters))}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self._total(self.lora_routing.now().live)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.q_proj(self.words(ids))))


@pytest.fixture(autouse=True)
def known() -> Iterator[RemovableHandle]:
    with hf_lora.register_layer(nn.Embedding, Shifted) as handle:
        yield handle


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def wrapped(**fields: Any) -> Any:
    return hf_lora.wrap(net(), ["words", "q_proj"], **{"r": 2, "train": ["head"], **fields})


def trained(**fields: Any) -> Any:
    model = wrapped(**fields)
    optimizer = torch.optim.SGD(hf_lora.optimizer_groups(model, lr=0.1), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
    return model


def test_it_is_planned_as_it_is_wrapped():
    plan = hf_lora.plan(net(), ["words", "q_proj"], r=2)
    assert [target.path for target in plan.targets] == ["words", "q_proj"]
    assert plan.targets[0].shapes == {LEFT: (2, 8), RIGHT: (2, 8)}
    assert plan.parameters == 2 * 2 * 8 + 2 * (8 + 8)
    assert "2 x 8, 2 x 8" in str(plan)
    model = wrapped(train=())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters
    assert plan.weight_bytes == 4 * plan.parameters


def test_the_costs_of_many_processes_count_it():
    alone = hf_lora.plan(net(), ["words"], r=2)
    shared = hf_lora.plan(net(), ["words"], r=2, world=2)
    assert shared.per_rank[0].gradients == alone.gradient_bytes


def test_it_begins_as_the_base_trains_and_steps_aside():
    model, base = wrapped(), net()
    assert torch.equal(model(TOKENS), base(TOKENS))
    assert list(model.state_dict())[:3] == ["words.weight", "words.toy_left", "words.toy_right"]
    assert isinstance(model.words, nn.Embedding)
    trained_one = trained()
    assert trained_one.words.toy_right.any()
    assert torch.equal(trained_one.words.weight, base.words.weight)
    with hf_lora.no_adapter(trained_one):
        assert torch.equal(trained_one(TOKENS), base(TOKENS))
    assert not torch.equal(trained_one(TOKENS), base(TOKENS))


def test_its_optimizer_groups_are_its_own():
    groups = hf_lora.optimizer_groups(wrapped(), lr=0.1, weight_decay=0.5, b_lr_ratio=4)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("lora_A", 0.1),
        ("lora_B", 0.4),
        ("trained", 0.1),
        ("trained_no_decay", 0.1),
        (LEFT, 0.1),
        (RIGHT, 0.4),
    ]


def test_the_summary_has_its_norm():
    model = trained()
    (one,) = hf_lora.summary(model).adapters
    config = registry_of(model).adapter("default").slots["words"]
    want = _shift(model.words.lora_tensors("default"), config).norm().item()
    assert one.norms["words"] == pytest.approx(want)
    assert one.layers == 2
    assert one.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_it_is_saved_and_loaded_under_its_own_names(tmp_path: Path):
    model = trained()
    hf_lora.save(model, tmp_path)
    file = TensorFile(tmp_path / "adapter_model.safetensors")
    assert file.shapes["base_model.model.words.toy_left.weight"] == (2, 8)
    again = hf_lora.load(net(), tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS))
    hf_lora.save(again, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_file_for_another_width_is_refused(tmp_path: Path):
    hf_lora.save(trained(), tmp_path)
    other = net()
    other.words = nn.Embedding(11, 6)
    with pytest.raises(hf_lora.AdapterMismatchError, match="words: 8 columns, not 6"):
        hf_lora.load(other, tmp_path)


def test_where_it_is_unknown_its_files_are_refused(tmp_path: Path, known: RemovableHandle):
    hf_lora.save(trained(), tmp_path)
    known.remove()
    with pytest.raises(hf_lora.AdapterFileError, match="words has no tensors"):
        hf_lora.load(net(), tmp_path)


def test_it_is_described_from_its_files(tmp_path: Path):
    model = trained()
    hf_lora.save(model, tmp_path)
    found = {layer.path: layer for layer in describe(tmp_path).layers}
    assert found["words"].norm == pytest.approx(hf_lora.summary(model).adapters[0].norms["words"])
    assert found["words"].parameters == 32
    assert "2 x 8, 2 x 8" in str(describe(tmp_path))


def test_merging_is_exact_and_undone():
    model = trained()
    want, weight = model(TOKENS), model.words.weight
    hf_lora.merge(model)
    torch.testing.assert_close(model(TOKENS), want)
    assert model.words.weight is not weight
    hf_lora.unmerge(model)
    assert model.words.weight is weight
    assert torch.equal(model(TOKENS), want)


def test_merged_for_good_and_unwrapped_it_is_a_plain_model():
    model = trained()
    want = model(TOKENS)
    plain = hf_lora.merge_and_unwrap(model)
    assert type(plain.words) is nn.Embedding
    torch.testing.assert_close(plain(TOKENS), want)
    base = net()
    back = hf_lora.unwrap(trained())
    assert type(back.words) is nn.Embedding
    assert torch.equal(back(TOKENS), base(TOKENS))
    assert list(back.state_dict()) == list(base.state_dict())


def test_several_adapters_at_strengths_of_their_own():
    model = trained()
    hf_lora.add_adapter(model, "b", "words", r=1)
    with torch.no_grad():
        model.words.toy_right_b.add_(0.5)
    hf_lora.activate(model, {"b": 0.5})
    scaling = registry_of(model).adapter("b").slots["words"].scaling
    want = net().words(TOKENS) + 0.5 * scaling * 0.5
    torch.testing.assert_close(model.words(TOKENS), want)
    hf_lora.delete_adapter(model, "b")
    assert not hasattr(model.words, "toy_right_b")


def test_a_view_of_the_base_has_nothing_of_it():
    model = trained()
    view = hf_lora.base_view(model)
    assert type(view.words) is nn.Embedding
    assert torch.equal(view(TOKENS), net()(TOKENS))


def test_the_card_tells_of_it():
    model = trained()
    card = adapter_card(model, registry_of(model), ["default"], base=None, repo_id="me/toy")
    assert "`words`" in card
    assert f"{hf_lora.summary(model).adapters[0].parameters:,}" in card
