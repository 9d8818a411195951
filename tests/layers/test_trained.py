"""Modules trained in full beside an adapter: copies that are read instead of the base's tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import hf_lora
from hf_lora import StateError, TargetError
from hf_lora.layers.trained import TrainedModule
from hf_lora.model.registry import registry_of
from tests.snapshot import snapshot
from tests.tiny import Net, answers, scramble

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """A linear layer to adapt and one module to train in full."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.fc, self.other, self.call = nn.Linear(6, 6), module, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.other, self.fc(x))


class Counting(nn.Module):
    """Replaces a buffer of its own in every call, instead of changing it in place."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        self.hidden = self.hidden + 1
        return x * self.scale


def plain(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


MODULES: list[tuple[str, Callable[[], nn.Module], Callable]] = [
    ("Linear", lambda: nn.Linear(6, 3), plain),
    ("Sequential", lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), plain),
    ("LayerNorm", lambda: nn.LayerNorm(6), plain),
    ("BatchNorm1d", lambda: nn.BatchNorm1d(6), plain),
    ("GRU", lambda: nn.GRU(6, 3), lambda m, x: m(x)[0]),
    ("LSTM", lambda: nn.LSTM(6, 3, 2, bidirectional=True), lambda m, x: m(x[:, None])[0]),
    ("MultiheadAttention", lambda: nn.MultiheadAttention(6, 2), lambda m, x: m(x, x, x)[0]),
    ("Conv1d", lambda: nn.Conv1d(6, 3, 1), lambda m, x: m(x[..., None])),
    ("Embedding", lambda: nn.Embedding(9, 6), lambda m, x: x + m(torch.tensor(3))),
    ("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(6, 3)), plain),
    ("pruned", lambda: prune.random_unstructured(nn.Linear(6, 3), "weight", 0.5), plain),
    ("Counting", Counting, plain),
]


@pytest.mark.parametrize(("make", "call"), [m[1:] for m in MODULES], ids=[m[0] for m in MODULES])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_module_trained_in_full(make: Callable[[], nn.Module], call: Callable, training: bool):
    """It starts equal, trains, leaves the base alone, steps back when asked, and comes off."""
    model = Body(make(), call).train(training)
    if not training:
        y = model(X)  # in training, BatchNorm's running means would move with it
    before = snapshot(model)

    hf_lora.wrap(model, targets="fc", r=2, train=["other"])
    assert isinstance(model.other, TrainedModule) or any(
        isinstance(m, TrainedModule) for m in model.other.modules()
    )
    if not training:
        assert torch.equal(model(X), y)
    own = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("other.")]
    assert own
    optimizer = torch.optim.SGD(own, lr=0.5)
    model(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in own)
    optimizer.step()
    base = {n: d for n, _, _, d in before.parameters} | dict(before.buffers)
    now = snapshot_of_base(model)
    changed = [name for name in base if name in now and base[name] != now[name]]
    assert changed in ([], ["other.hidden"])  # what no checkpoint holds belongs to the module

    if not training:
        trained = model(X)
        assert not torch.equal(trained, y)
        with hf_lora.no_adapter(model):
            assert torch.equal(model(X), y)
        hf_lora.merge(model)
        assert torch.equal(model(X), trained)
        hf_lora.unmerge(model)
        assert torch.equal(model(X), trained)
    hf_lora.unwrap(model)
    after = snapshot(model)
    assert after.modules == before.modules
    assert after.parameters == before.parameters
    assert after.keys == before.keys
    if not training:
        assert torch.equal(model(X), y)


def snapshot_of_base(model: nn.Module) -> dict[str, str]:
    """Return the hash of everything that has a name which the base had."""
    shot = snapshot(model)
    return {n: d for n, _, _, d in shot.parameters} | dict(shot.buffers)


def test_running_means_move_in_the_copy():
    model = Body(nn.BatchNorm1d(6), plain).train()
    hf_lora.wrap(model, targets="fc", r=2, train=["other"])
    model(X)
    norm = model.other
    assert norm.running_mean.any()
    assert norm.num_batches_tracked == 1
    assert not norm._buffers["running_mean"].any()
    with hf_lora.no_adapter(model):
        assert not norm.running_mean.any()


def test_two_adapters_have_a_copy_each_and_cannot_be_added_up():
    model = Net()
    base = answers(model)
    hf_lora.wrap(model, targets="q_proj", r=2, train=["head"])
    hf_lora.add_adapter(model, "b", targets="v_proj", r=2, train=["head"])
    hf_lora.add_adapter(model, "c", targets="v_proj", r=2)
    scramble(model)
    found = {}
    for name in ("default", "b", "c", []):
        with hf_lora.use_adapter(model, name):
            found[str(name)] = answers(model)
    assert torch.equal(found.pop("[]"), base)
    values = list(found.values())
    assert not any(torch.equal(values[i], values[j]) for i in range(3) for j in range(i))
    for verb in (
        lambda: hf_lora.activate(model, ["default", "b"]),
        lambda: hf_lora.use_adapter(model, ["b", "default"]),
        lambda: hf_lora.merge(model, ["default", "b"]),
        lambda: hf_lora.merge(model, "b"),  # default is active
    ):
        with pytest.raises(StateError, match="head: default, b"):
            verb()
    hf_lora.activate(model, ["default", "c"])
    hf_lora.delete_adapter(model, "default")
    assert isinstance(model.head, TrainedModule)
    hf_lora.delete_adapter(model, "b")
    assert type(model.head) is nn.Linear


def test_one_module_is_not_both_adapted_and_trained():
    model = Net()
    hf_lora.wrap(model, targets="q_proj", r=2, train=["head"])
    with pytest.raises(TargetError, match="head is trained in full by another adapter"):
        hf_lora.add_adapter(model, "b", targets=["head", "v_proj"], r=2)
    with pytest.raises(TargetError, match="q_proj has a low-rank update from another adapter"):
        hf_lora.add_adapter(model, "b", targets="v_proj", r=2, train=[r"layers\.0"])
    with pytest.raises(TargetError, match="q_proj has a low-rank update"):
        hf_lora.add_adapter(model, "b", targets="v_proj", r=2, train=["q_proj"])
    assert hf_lora.adapters(model).keys() == {"default"}
    # inside one adapter the full training wins, and the plan says so
    plan = hf_lora.plan(Net(), targets=["q_proj", "v_proj"], train=[r"layers\.0"])
    assert [target.path for target in plan.targets] == ["layers.1.q_proj", "layers.1.v_proj"]
    assert plan.left_out["layers.0.q_proj"] == "trained in full"


def test_code_that_reads_the_weight_from_outside_gets_the_copy():
    model = Net()
    hf_lora.wrap(model, targets="q_proj", r=2, train=["head"])
    scramble(model)
    assert model.head.weight is model.head.lora_copy_weight
    assert model.head.weight.requires_grad
    with hf_lora.no_adapter(model):
        assert not model.head.weight.requires_grad
    x = torch.randn(2, 8)
    assert torch.equal(nn.functional.linear(x, model.head.weight, model.head.bias), model.head(x))


def test_what_cannot_be_trained_in_full_is_refused():
    model = Body(nn.Linear(6, 6), plain)
    quantize_(model.other, Int8WeightOnlyConfig())
    with pytest.raises(TargetError, match="other cannot be trained in full: its weight is a Int8"):
        hf_lora.wrap(model, targets="fc", r=2, train=["other"])
    lazy = Body(nn.LazyLinear(3), plain)
    with pytest.raises(TargetError, match="its weight has no size yet"):
        hf_lora.wrap(lazy, targets="fc", r=2, train=["other"])
    meta = Net()
    meta.layers[1].to("meta")
    with pytest.raises(StateError, match="on the meta device"):
        hf_lora.wrap(meta, targets="layers.0.q_proj", r=2, train=[r"layers\.1"])
    own = Net()
    own.head.forward = lambda x: x
    with pytest.raises(TargetError, match="head has a forward of its own"):
        hf_lora.wrap(own, targets="q_proj", r=2, train=["head"])


def test_a_name_that_is_taken_is_said():
    model = Net()
    model.head.register_parameter("weight_x", nn.Parameter(torch.zeros(1)))
    hf_lora.wrap(model, targets="q_proj", r=2, train=["head"])
    with pytest.raises(TargetError, match="has something called lora_copy_weight_x already"):
        hf_lora.add_adapter(model, "x", targets="v_proj", r=2, train=["head"])
    assert hf_lora.adapters(model).keys() == {"default"}
    hf_lora.add_adapter(model, "y", targets="v_proj", r=2, train=["head"])


SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("make", "call"), [m[1:] for m in MODULES], ids=[m[0] for m in MODULES])
def test_copies_in_32_bits_compute_as_the_16_bit_module(
    make: Callable[[], nn.Module], call: Callable, dtype: torch.dtype
):
    """Outputs and gradients are those of the plain module, which holds its weights in 16 bits."""
    twins = []
    for _ in range(2):
        torch.manual_seed(0)
        twins.append(Body(make(), call).to(dtype).eval())
    model, twin = twins
    hf_lora.wrap(model, targets="fc", r=2, train=["other"])
    x = X.to(dtype)
    y, expected = model(x), twin(x)
    assert torch.equal(y, expected)
    (y.float().square().sum()).backward()
    (expected.float().square().sum()).backward()
    whole = dict(twin.named_parameters())
    for path, role, key in registry_of(model).keys("default"):
        if not path.startswith("other") or key not in dict(model.named_parameters()):
            continue
        copied, original = model.get_parameter(key), whole[f"{path}.{role}"]
        assert copied.dtype == torch.float32
        assert copied.grad is not None
        assert original.grad is not None
        assert torch.equal(copied.grad, original.grad.float())


def test_copies_have_the_type_that_is_asked_for():
    for asked, base, expected in (
        (None, torch.bfloat16, torch.float32),
        (None, torch.float64, torch.float64),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
    ):
        model = Net().to(base)
        plan = hf_lora.plan(model, "q_proj", r=2, train=["head", "norm"], dtype=asked)
        hf_lora.wrap(model, "q_proj", r=2, train=["head", "norm"], dtype=asked)
        trains = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trains} == {expected}
        assert model.head.weight.dtype == base
        assert plan.weight_bytes == sum(p.numel() * p.itemsize for p in trains)


def test_a_grad_scaler_steps_copies_of_a_float16_base():
    model = hf_lora.wrap(Net().half(), "q_proj", r=2, train=["head"])
    trains = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trains]
    optimizer = torch.optim.SGD(trains, lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.ones(2, 8, dtype=torch.float16)).float().square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    moved = [not torch.equal(p, b) for p, b in zip(trains, before, strict=True)]
    assert all(moved[-2:])  # the head: such a step is nothing in 16 bits


def test_copies_merge_to_what_the_module_computed_with():
    model = hf_lora.wrap(Net().bfloat16(), "q_proj", r=2, train=["head"])
    scramble(model)
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    weight, y = model.head.weight.detach().clone(), model.head(x)
    hf_lora.merge(model)
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.head.weight, weight)
    assert torch.equal(model.head(x), y)
