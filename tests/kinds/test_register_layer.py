"""A kind of layer of somebody's own: registered, it is planned, saved and merged as any."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.functional.low_rank import update_norm
from hf_lora.kinds.table import kind_of
from hf_lora.layers.factors import Factored
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.roles import Layout, Shapes

ROOT = Path(__file__).parents[2]
X = torch.linspace(-1, 1, 24).view(3, 8)


class Project(nn.Module):
    """Multiplies by a matrix that it keeps as (in, out), and declares no sizes."""

    def __init__(self, wide: int, narrow: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wide, narrow) / wide**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class LoRAProject(hf_lora.LoRALayer):
    fan_in_fan_out = True

    @classmethod
    def lora_widths(cls, host: nn.Module) -> tuple[int, int]:
        assert isinstance(host, Project)
        wide, narrow = host.weight.shape
        return wide, narrow


class Doubled(hf_lora.LoRALayer):
    """Takes the place of the package's own class, and reads its input twice."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs) * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = Project(8, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@torch.no_grad()
def loud(model: Any) -> Any:
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    return model


def test_a_linear_layer_of_ones_own_is_adapted_as_any(tmp_path: Path):
    with hf_lora.register_layer(Project, LoRAProject):
        assert [t.path for t in hf_lora.plan(Net(), r=2).targets] == ["first", "second"]
        model = loud(hf_lora.wrap(Net(), r=2))
        base, first = Net(), model.first
        weight = base.first.weight + (first.scaling * first.lora_B @ first.lora_A).t()
        torch.testing.assert_close(first(X), X @ weight)
        model(X).sum().backward()
        assert first.lora_A.grad is not None
        hf_lora.save(model, tmp_path)
        again = hf_lora.load(Net(), tmp_path)
        assert torch.equal(again(X), model(X))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(X), model(X))
        want, kept = model(X), first.weight
        hf_lora.merge(model)
        torch.testing.assert_close(model(X), want)
        hf_lora.unmerge(model)
        assert first.weight is kept
        plain = hf_lora.merge_and_unwrap(model)
        assert type(plain.first) is Project
        torch.testing.assert_close(plain(X), want)


def test_without_the_registration_it_is_no_layer():
    handle = hf_lora.register_layer(Project, LoRAProject)
    handle.remove()
    with pytest.raises(hf_lora.TargetError, match="Project is no linear layer"):
        hf_lora.wrap(Net(), "first", r=2)


def test_what_was_patched_before_stays_as_it_is():
    before = loud(hf_lora.wrap(Net(), "second", r=2))
    want = before(X)
    with hf_lora.register_layer(nn.Linear, Doubled):
        assert torch.equal(before(X), want)
        assert kind_of(before.second) is not Doubled
        model = loud(hf_lora.wrap(Net(), "second", r=2))
        assert torch.equal(model.second(torch.ones(6)), 2 * before.second(torch.ones(6)))
        hf_lora.add_adapter(before, "b", "second", r=1)
    hf_lora.add_adapter(model, "b", "second", r=1)
    assert isinstance(model.second, Doubled)
    assert type(hf_lora.unwrap(model).second) is nn.Linear


def test_the_last_registration_wins_and_a_removal_brings_back_the_one_before():
    with hf_lora.register_layer(Project, LoRAProject):
        inner = hf_lora.register_layer(Project, Again)
        assert kind_of(Net().first) is Again
        inner.remove()
        assert kind_of(Net().first) is LoRAProject
    assert kind_of(Net().first) is None


class Again(LoRAProject):
    pass


# Neighbour: two factors on something that is no matrix at all, with names that linear layers have.
A, B = "lora_A", "lora_B"


def _fault(shapes: Shapes) -> str | None:
    return None if shapes[A][0] == shapes[B][-1] else f"has {shapes[A]} and {shapes[B]}"


SCALES = Layout(
    roles=(A, B),
    fault=_fault,
    rank=lambda shapes: shapes[A][0],
    norm=lambda tensors, config: update_norm(tensors[A], tensors[B], config.scaling),
)


class LoRANorm(Factored):
    """Adds the product of two small factors, read as a vector, to a normalization's scale."""

    lora_layout = SCALES

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        assert isinstance(host, nn.LayerNorm)
        (width,) = host.normalized_shape
        return {A: (config.r, width // 2), B: (2, config.r)}

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        want = cls.lora_shapes(host, LayerConfig(r=shapes[A][0], alpha=1.0))
        return None if want == dict(shapes) else f"would have {want}, not {dict(shapes)}"

    def lora_delta(self, name: str) -> torch.Tensor:
        a, b = self.lora_pair(name)
        return self.lora_slots[name].scaling * (b @ a).flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        for name, factor in self.lora_routing.now().live:
            if name in self.lora_slots:
                unit = (y - self.bias) / self.weight  # type: ignore[operator]
                y = y + factor * self.lora_delta(name) * unit
        return y


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def test_factors_of_other_shapes_may_have_the_names_that_linear_layers_have(tmp_path: Path):
    with hf_lora.register_layer(nn.LayerNorm, LoRANorm):
        assert [t.path for t in hf_lora.plan(Normed(), r=2).targets] == ["head"]
        model = loud(hf_lora.wrap(Normed(), ["norm", "head"], r=2))
        hf_lora.save(model, tmp_path)
        again = hf_lora.load(Normed(), tmp_path)
        assert torch.equal(again(X), model(X))
        want = model(X)
        torch.testing.assert_close(hf_lora.merge_and_unwrap(model)(X), want)


WRONG: list[tuple[Any, Any, str]] = [
    (nn.Linear(2, 2), Doubled, "is no class of modules"),
    (int, Doubled, "is no class of modules"),
    (nn.Module, Doubled, "nn.Module is what every module is"),
    (hf_lora.LoRALinear, Doubled, "LoRALinear is a class of adapted layers already"),
    (Project, nn.Linear, "is no class of layers; derive it from hf_lora.LoRALayer"),
    (Project, Factored, "Factored does not define lora_shapes"),
    (Project, Factored, "Factored does not define forward"),
    (Project, Factored, "Factored has no lora_layout"),
]


@pytest.mark.parametrize(("host", "layer", "words"), WRONG)
def test_a_wrong_class_is_refused_by_name(host: Any, layer: Any, words: str):
    with pytest.raises(hf_lora.ConfigError, match=re.escape(words)):
        hf_lora.register_layer(host, layer)
    assert kind_of(Net().first) is None


def test_everything_that_is_wrong_is_named_at_once():
    with pytest.raises(hf_lora.ConfigError) as caught:
        hf_lora.register_layer(int, nn.Linear)  # type: ignore[arg-type]
    assert "host_class" in str(caught.value)
    assert "layer_class" in str(caught.value)


def test_the_example_for_contributors_runs():
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    try:
        exec(compile(example, "CONTRIBUTING.md", "exec"), names)
        model = names["model"]
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            "0.lora_A",
            "0.lora_B",
        ]
    finally:
        names["handle"].remove()
    assert len(example.splitlines()) <= 20
