"""The fused update on top of quantized hosts: the plain path's gradients, and no weight kept."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.functional import composed
from hf_lora.layers.quantized import float_weight
from tests.layers.fused_models import routing
from tests.layers.test_quantized import WIDTH, Net, each_model, rows
from tests.rounding import assert_rounded_alike
from tests.tiny import scramble


def adapted(make: Callable[[], Net]) -> Net:
    model = hf_lora.wrap(make(), targets=["down", "up"], r=4)
    scramble(model)
    return model.train()


def in_float64(model: Net) -> Net:
    """Return the same adapter on what the packed weights say, as plain layers of float64."""
    twin = Net(lambda: nn.Linear(WIDTH, WIDTH)).double()
    twin.norm.load_state_dict(model.norm.state_dict())
    twin.head.load_state_dict(model.head.state_dict())
    hf_lora.wrap(twin, targets=["down", "up"], r=4)
    with torch.no_grad():
        for own, other in ((twin.down, model.down), (twin.up, model.up)):
            own.weight.copy_(float_weight(other))
            own.bias.zero_() if other.bias is None else own.bias.copy_(other.bias)
            own.lora_A.copy_(other.lora_A)
            own.lora_B.copy_(other.lora_B)
    return twin.train()


def gradients(model: Net, *, plain: bool = False) -> list[torch.Tensor]:
    routing(model).plain = plain
    model.zero_grad(set_to_none=True)
    x = rows().to(model.head.weight.dtype).requires_grad_()
    (model(x) * torch.linspace(-1, 1, 4)).sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def kept_sizes(model: nn.Module) -> list[int]:
    """Return the bytes of every storage that a forward keeps and that is not a parameter's."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(rows().requires_grad_())
    assert y.requires_grad
    own = {p.untyped_storage().data_ptr() for p in model.parameters() if type(p) is nn.Parameter}
    return sorted(size for pointer, size in found.items() if pointer not in own)


@each_model
@pytest.mark.parametrize("few", [0, composed.FEW_ROWS])
def test_gradients_are_those_of_the_plain_path(
    make: Callable[[], Net], few: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(composed, "FEW_ROWS", few)
    model = adapted(make)
    found, wanted = gradients(model), gradients(model, plain=True)
    assert len(found) == 5
    assert_rounded_alike((found, wanted, gradients(in_float64(model))))
    assert set(hf_lora.summary(model).computed.values()) == {"plain"}
    routing(model).plain = False
    assert set(hf_lora.summary(model).computed.values()) == {"on top"}


@each_model
def test_only_the_inputs_are_kept(make: Callable[[], Net], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(composed, "FEW_ROWS", 0)
    model = adapted(make)
    above = sum(kept_sizes(model)) - sum(kept_sizes(hf_lora.base_view(model).train()))
    factors = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert above <= 2 * rows().nbytes + factors
    assert above < WIDTH * WIDTH * 4
