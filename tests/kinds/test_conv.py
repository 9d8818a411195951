"""Convolutions: the update is one of the same kind, as PEFT has it, and merges exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hf_lora
from hf_lora.errors import AdapterMismatchError, TargetError

SIZES = {nn.Conv1d: (9,), nn.Conv2d: (9, 8), nn.Conv3d: (5, 6, 4)}
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride and padding": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "dilated": {"dilation": 2, "padding": 2},
    "pointwise": {"kernel_size": 1},
    "grouped": {"groups": 2},
    "without bias": {"bias": False},
}
PEFTS = ("plain", "stride and padding", "pointwise", "grouped", "without bias")
"""Those that PEFT computes as the host does: it leaves out dilation and the way of padding."""


class Net(nn.Module):
    def __init__(self, kind: type = nn.Conv2d, **fields: Any):
        super().__init__()
        torch.manual_seed(5)
        self.conv = kind(4, 6, **{"kernel_size": 3, **fields})
        self.norm = nn.GroupNorm(1, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.tanh(self.conv(x)))


def inputs(kind: type) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4, *SIZES[kind])


@torch.no_grad()
def loud(model: Any) -> Any:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    return model.eval()


def wrapped(kind: type = nn.Conv2d, r: int = 2, **fields: Any) -> Any:
    return loud(hf_lora.wrap(Net(kind, **fields), "conv", r=r))


def dense(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What the layer means, from a weight for each output channel, in the type of ``x``."""
    conv, config = model.conv, hf_lora.plan(Net(), "conv", r=2).targets[0].slot
    a, b = (factor.detach().to(x.dtype) for factor in conv.lora_pair("default"))
    each = conv.groups
    rows = torch.cat(
        [
            (rb.flatten(1) @ ra.flatten(1)).view(-1, *a.shape[1:])
            for ra, rb in zip(a.chunk(each), b.chunk(each), strict=True)
        ]
    )
    kind = conv.lora_host
    same = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    same["padding_mode"] = conv.padding_mode
    update = kind(4, 6, bias=False, **same).to(x.dtype)
    update.weight.data = rows
    base = Net(kind, groups=each, bias=conv.bias is not None, **same).to(x.dtype)
    return base.norm(torch.tanh(base.conv(x) + config.scaling * update(x)))


@pytest.mark.parametrize("kind", SIZES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_it_computes_the_formula(kind: type, fields: dict[str, Any]):
    model, plain = wrapped(kind, **fields), Net(kind, **fields)
    assert isinstance(model.conv, kind)
    want = dense(model, inputs(kind).double())
    torch.testing.assert_close(model(inputs(kind)).double(), want, rtol=1e-4, atol=1e-5)
    fresh = hf_lora.wrap(Net(kind, **fields), "conv", r=2)
    assert torch.equal(fresh(inputs(kind)), plain(inputs(kind)))
    assert hf_lora.unwrap(model).conv.__class__ is kind


@pytest.mark.parametrize("kind", SIZES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "grouped"])
def test_merging_is_exact_and_undone(kind: type, name: str):
    model, x = wrapped(kind, **FIELDS[name]), inputs(kind)
    want, weight = model(x), model.conv.weight
    hf_lora.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    hf_lora.unmerge(model)
    assert model.conv.weight is weight
    assert torch.equal(model(x), want)


def test_a_grouped_one_cannot_be_merged():
    model = wrapped(groups=2)
    with pytest.raises(TargetError, match="it is grouped, and an update reads all channels"):
        hf_lora.merge(model)


@pytest.mark.parametrize("kind", SIZES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", PEFTS)
def test_files_go_both_ways(kind: type, name: str, tmp_path: Path):
    fields, x = FIELDS[name], inputs(kind)
    model = wrapped(kind, **fields)
    hf_lora.save(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(Net(kind, **fields), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-6)
    made = loud(get_peft_model(Net(kind, **fields), LoraConfig(target_modules=["conv"], r=4)))
    made.save_pretrained(str(tmp_path / "pefts"))
    again = hf_lora.load(Net(kind, **fields), tmp_path / "pefts").eval()
    torch.testing.assert_close(again(x), made(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FIELDS)
def test_its_gradients_are_autograds_of_the_formula(name: str):
    model, x = wrapped(**FIELDS[name]).double(), inputs(nn.Conv2d).double()
    x.requires_grad_()
    inner = model.conv

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        held = {"conv.lora_A": a, "conv.lora_B": b}
        return torch.func.functional_call(model, held, (x,))

    pair = [factor.detach().requires_grad_() for factor in inner.lora_pair("default")]
    assert torch.autograd.gradcheck(function, (x[:1], *pair), atol=1e-6)


def test_several_adapters_and_dropout():
    model = wrapped()
    hf_lora.add_adapter(model, "b", "conv", r=1, dropout=0.5)
    x, base = inputs(nn.Conv2d), Net().eval()
    only_a = model(x)
    hf_lora.activate(model, {"default": 0.5, "b": 1.0})
    assert not torch.equal(model(x), only_a)  # b is zero, and a is halved
    with hf_lora.no_adapter(model):
        assert torch.equal(model(x), base(x))
    loud(model)
    hf_lora.activate(model, "b")
    model.train()
    with torch.no_grad():
        model.conv.lora_B_b.normal_()
    assert not torch.equal(model(x), model(x))


def test_the_norm_is_that_of_the_update():
    for groups in (1, 2):
        model = wrapped(groups=groups)
        a, b = (factor.detach().double() for factor in model.conv.lora_pair("default"))
        rows = [
            (rb.flatten(1) @ ra.flatten(1)).flatten()
            for ra, rb in zip(a.chunk(groups), b.chunk(groups), strict=True)
        ]
        scaling = hf_lora.plan(Net(), "conv", r=2).targets[0].slot.scaling
        want = scaling * torch.cat(rows).norm().item()
        (found,) = hf_lora.summary(model).adapters
        assert found.norms["conv"] == pytest.approx(want)


class Own(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("make", "r", "words"),
    [
        (lambda: nn.ConvTranspose2d(4, 6, 3), 2, "a transposed convolution"),
        (lambda: Own(4, 6, 3), 2, "a forward of its own"),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), 3, "cannot be shared equally by its 2 groups"),
        (lambda: nn.Conv2d(4, 6, 3), 7, "larger than the most that its update can have, 6"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(make: Any, r: int, words: str):
    model = Net()
    model.conv = make()
    with pytest.raises(TargetError, match=words):
        hf_lora.wrap(model, "conv", r=r)
    assert type(model.conv) is type(make())


def test_a_file_for_another_kernel_is_refused(tmp_path: Path):
    hf_lora.save(wrapped(), tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"conv: the adapter has lora_A \(2, 4, 3, 3\)"):
        hf_lora.load(Net(kernel_size=5), tmp_path)
    other = Net()
    other.conv = nn.Linear(4, 6)
    with pytest.raises(AdapterMismatchError, match="for another kind of layer"):
        hf_lora.load(other, tmp_path)


def test_all_linear_leaves_it_alone():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(12, 2), nn.Linear(2, 2))
    plan = hf_lora.plan(model, "all-linear", r=1)
    assert "0" not in [target.path for target in plan.targets]


def test_it_trains_and_is_saved_again_to_the_same_bytes(tmp_path: Path):
    model = hf_lora.wrap(Net(), "conv", r=2)
    optimizer = torch.optim.SGD(hf_lora.optimizer_groups(model, lr=0.1), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs(nn.Conv2d)).square().mean().backward()
        optimizer.step()
    assert model.conv.lora_B.any()
    assert torch.equal(model.conv.weight, Net().conv.weight)
    hf_lora.save(model, tmp_path / "a")
    hf_lora.save(hf_lora.load(Net(), tmp_path / "a"), tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
