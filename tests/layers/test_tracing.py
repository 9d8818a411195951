"""The trace at the first step: nothing of the user's is copied, written, or run without need."""

import torch
from torch import nn

import hf_lora
from tests.layers.fused_models import groups

CALLS: list[int] = []
"""The address of a model's table in each of its forwards, the traced one included."""


class Net(nn.Module):
    """Layers that read one tensor, and one that does not; its forward leaves a mark outside."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("table", torch.ones(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        CALLS.clear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(self.table.data_ptr())
        x = x * self.table
        return self.out(self.q(x) * self.k(x))


class Counting(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.count += 1
        return y


class Normed(Net):
    """Writes its input, as code that saves memory does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.div_(2))


def trained(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    y.sum().backward()
    return y


def test_buffers_are_shared():
    model = hf_lora.wrap(Net(), ["q", "k"], r=2)
    trained(model, torch.ones(4, 8))
    assert groups(model) == [["q", "k"]]
    assert len(CALLS) == 2
    assert set(CALLS) == {model.table.data_ptr()}


def test_a_buffer_that_counts_counts_once():
    model = hf_lora.wrap(Counting(), ["q", "k"], r=2)
    for steps in (1, 2):
        trained(model, torch.ones(4, 8))
        assert model.count == steps
    assert groups(model) == []


def test_an_input_that_is_written_is_written_once():
    model, x = hf_lora.wrap(Normed(), ["q", "k"], r=2), torch.ones(4, 8)
    trained(model, x)
    assert torch.equal(x, torch.full((4, 8), 0.5))


def test_a_model_whose_layers_share_nothing_is_not_traced():
    for targets in (["q"], ["out"], ["k"]):
        model = hf_lora.wrap(Net(), targets, r=2)
        trained(model, torch.ones(4, 8))
        assert len(CALLS) == 1
    stack = hf_lora.wrap(nn.Sequential(Net(), nn.Sequential(*map(nn.Linear, [8] * 3, [8] * 3))),
                         r"1\.\d", r=2)  # fmt: skip
    trained(stack, torch.ones(4, 8))
    assert len(CALLS) == 1


def test_a_layer_that_is_adapted_later_is_found():
    model = hf_lora.wrap(Net(), ["q"], r=2)
    trained(model, torch.ones(4, 8))
    hf_lora.add_adapter(model, "second", ["k"], r=2)
    hf_lora.activate(model, ["default", "second"])
    trained(model, torch.ones(4, 8))
    assert groups(model) == [["q", "k"]]
    assert len(CALLS) == 3  # two steps, and one trace


def test_neighbours_of_modules_are_found():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(8, 2)}) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([head["lin"](x) for head in self.heads], dim=-1)

    model = hf_lora.wrap(Heads(), "lin", r=2)
    trained(model, torch.ones(4, 8))
    assert groups(model) == [[f"heads.{n}.lin" for n in range(3)]]
