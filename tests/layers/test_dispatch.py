"""The table of ways to compute a layer: which is taken when, and that all do what the last does."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.functional.composed import FEW_ROWS
from hf_lora.layers import dispatch
from hf_lora.layers.dispatch import ALONE, BASE, ON_TOP, ORACLE, TOGETHER, WAYS, Call, Way
from tests.rounding import assert_rounded_alike

ROWS = 40


class Net(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ways that were taken, one for each call of a layer."""
    names: list[str] = []

    def noted(way: Way) -> Way:
        def compute(call: Call) -> torch.Tensor | None:
            y = way.compute(call)
            if y is not None:
                names.append(way.name)
            return y

        return way._replace(compute=compute)

    monkeypatch.setattr(dispatch, "WAYS", tuple(map(noted, WAYS)))
    return names


def wrapped(model: nn.Module) -> nn.Module:
    hf_lora.wrap(model, targets=["left", "right"], r=2, init="gaussian")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def nothing(model: nn.Module) -> None:
    pass


def doubled(model: nn.Module) -> None:
    model.left.__class__ = model.right.__class__ = Doubled


def plain(model: nn.Module) -> None:
    model.left.lora_routing.plain = True


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (nothing, nothing, [ALONE, TOGETHER]),
        (doubled, nothing, [ON_TOP, ON_TOP]),
        (nothing, lambda model: hf_lora.activate(model, []), [BASE, BASE]),
        (nothing, plain, [ORACLE, ORACLE]),
    ],
)
def test_a_way_is_taken_and_gives_what_the_plain_one_does(
    before: Callable[[nn.Module], None],
    after: Callable[[nn.Module], None],
    expected: list[Way],
    taken: list[str],
):
    model = Net()
    before(model)
    after(wrapped(model))
    x = torch.randn(ROWS, 8)
    if (first := model(x)).requires_grad:
        first.sum().backward()  # looks for layers that read one tensor
    taken.clear()
    y = model(x)
    assert taken == [way.name for way in expected]
    oracle = copy.deepcopy(model).double()
    plain(oracle)
    plain(again := copy.deepcopy(model))
    assert_rounded_alike((y, again(x), oracle(x.double())))


def test_the_plain_way_is_the_last_and_always_can():
    assert WAYS[-1] is ORACLE
    layer = wrapped(Net()).left
    assert ORACLE.applies(Call(layer, (torch.zeros(1, 8),), {}))  # type: ignore[arg-type]
    assert len({way.name for way in WAYS}) == len({way.words for way in WAYS}) == len(WAYS)


def test_the_summary_counts_by_the_tables_words():
    model = wrapped(Net())
    model(torch.randn(ROWS, 8)).sum().backward()
    assert f"2 {TOGETHER.words}" in str(hf_lora.summary(model))


def test_the_hosts_forward_runs_once_where_a_way_finds_out_late_that_it_cannot(taken: list[str]):
    calls: list[int] = []

    class Odd(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(input).double()

    model = Net()
    model.left.__class__ = model.right.__class__ = Odd
    wrapped(model)
    calls.clear()
    taken.clear()
    with torch.no_grad():
        model(torch.randn(FEW_ROWS + 1, 8))
        assert taken == [ORACLE.name] * 2
        assert len(calls) == 2
        model(torch.randn(ROWS, 8))
        assert len(calls) == 4
