"""Classes of layer that ask for care: changed again later, sealed, copied, replicated."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import hf_lora
from hf_lora import HfLoRAError, StateError, TargetError
from tests.layers.own_layers import IN, OUT, Own
from tests.snapshot import snapshot
from tests.tiny import scramble


@pytest.mark.parametrize("verb", [hf_lora.unwrap, lambda m: hf_lora.delete_adapter(m, "b")])
def test_a_class_changed_again_by_another_library_is_not_thrown_away(
    verb: Callable[[nn.Module], object],
):
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    hf_lora.wrap(model, targets="0", r=2, adapter="b")
    hf_lora.add_adapter(model, "other", ".*", r=2)
    parametrizations.orthogonal(model[0])
    hf_lora.delete_adapter(model, "other")  # the class stays: the layer has another adapter
    hf_lora.add_adapter(model, "elsewhere", "1", r=2)
    with pytest.raises(StateError, match="changed these layers since"):
        verb(model)
    with pytest.raises(TargetError, match="computes its weight from other tensors"):
        hf_lora.merge(model)
    x = torch.randn(2, IN)
    y = model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.allclose(model(x), y, atol=1e-6)
    verb(model)


def test_the_trial_leaves_no_trace():
    class Watched(Own):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(IN)
            self.norm.running_var.fill_(4.0)  # so that it is no linear layer, in whatever mode

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x
            return super().forward(self.norm(x))

    model = nn.Sequential(Watched()).train()
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append(args))
    state, before = torch.random.get_rng_state(), snapshot(model)
    plan = hf_lora.plan(model, targets="0", r=2)
    assert not plan.problems
    assert torch.equal(torch.random.get_rng_state(), state)
    hf_lora.wrap(model, targets="0", r=2)
    scramble(model)
    with pytest.raises(TargetError, match="not x W"):
        hf_lora.merge(model)
    hf_lora.unwrap(model)
    assert not calls
    assert snapshot(model) == before


def test_the_seeds_constructor_refuses_what_wrap_refuses():
    meta = nn.Linear(IN, OUT, device="meta")
    patched = hf_lora.LoRALinear(nn.Linear(IN, OUT), 2)
    for base, r in ((Own(), 2), (meta, 2), (patched, 2), (nn.Linear(IN, OUT), 7), (None, 2)):
        with pytest.raises(HfLoRAError):
            hf_lora.LoRALinear(base, r)  # type: ignore[arg-type]


class Demanding(nn.Linear):
    """Cannot be made without arguments, not even by ``__new__``."""

    def __new__(cls, in_features: int, out_features: int, key: str):
        return super().__new__(cls)

    def __init__(self, in_features: int, out_features: int, key: str):
        super().__init__(in_features, out_features)
        self.key = key


def test_a_class_whose_new_wants_arguments():
    model = nn.Sequential(Demanding(IN, OUT, key="k"))
    hf_lora.wrap(model, targets="0", r=2)
    scramble(model)
    twin = copy.deepcopy(model)
    x = torch.randn(2, IN)
    assert torch.equal(twin(x), model(x))
    assert model[0].base.key == twin[0].key == "k"
    layer = hf_lora.LoRALinear(Demanding(IN, OUT, key="s"), 2)
    assert layer.key == "s"


class Sealed(nn.Linear):
    """Forbids subclasses."""

    def __init_subclass__(cls, **kwargs: object):
        raise TypeError("Sealed cannot be subclassed")


def test_a_class_that_cannot_be_patched_in_place_is_named_and_left_as_it_was():
    model = nn.Sequential(nn.Linear(IN, IN), Sealed(IN, OUT))
    before = snapshot(model)
    with pytest.raises(TargetError, match="1: Sealed cannot be patched in place"):
        hf_lora.wrap(model, targets=["0", "1"], r=2)
    assert snapshot(model) == before
    hf_lora.wrap(model, targets="0", r=2)


def test_a_parametrized_host_is_copied_and_says_itself_that_it_cannot_be_pickled():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(IN, OUT)))
    hf_lora.wrap(model, targets="0", r=2)
    scramble(model)
    twin, x = copy.deepcopy(model), torch.randn(2, IN)
    assert torch.equal(twin(x), model(x))
    assert twin[0].weight is not model[0].weight
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(model)
    hf_lora.unwrap(twin)
    parametrize.remove_parametrizations(twin[0], "weight")
    assert type(twin[0]) is nn.Linear


def replicas(model: nn.Module) -> nn.Module:
    """Make a replica as nn.DataParallel does on several GPUs: tensors become plain attributes."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        copy_of = copies[id(module)]
        for name, child in module._modules.items():
            copy_of._modules[name] = copies[id(child)]
        for name, parameter in module._parameters.items():
            setattr(copy_of, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            setattr(copy_of, name, buffer.clone())
    return copies[id(model)]


def test_replicas_of_data_parallel_answer_equally_and_train_the_original():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.BatchNorm1d(OUT), nn.Linear(OUT, 3)).eval()
    hf_lora.wrap(model, targets="0", r=2, train=["1", "2"])
    scramble(model)
    with torch.no_grad():
        model[1].running_mean.add_(1.0)
    x = torch.randn(4, IN)
    replica = replicas(model)
    assert torch.equal(replica(x), model(x))
    replica(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with hf_lora.no_adapter(model):
        assert torch.equal(replica(x), model(x))
