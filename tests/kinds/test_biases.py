"""Biases: the base's own that train, and one on B; in PEFT's files both ways, merged exactly."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_lora
from hf_lora.adapter_io.describe import describe
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.merging.hand_over import merged_tensors

BIASES = ("none", "lora_only", "all")


class Net(nn.Module):
    """Every kind of layer that has a bias, and some that nobody targets."""

    def __init__(self, middle: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv1d(4, 8, 3, groups=1)
        self.norm = nn.LayerNorm(8)
        self.one = nn.Linear(8, 6)
        self.two = Conv1D(8, 6)
        self.bare = nn.Linear(8, 8, bias=False)
        self.stats = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).transpose(1, 2))
        x = self.two(torch.tanh(self.one(x)))
        return self.last(torch.tanh(self.stats(self.bare(x).flatten(0, 1))))


TARGETS = ["conv", "one", "two", "bare"]
X = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
ALL = {"conv", "norm", "one", "two", "stats", "last"}
"""The modules that have a bias."""


@torch.no_grad()
def loud(model: Any, seed: int = 2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def wrapped(**fields: Any) -> Any:
    return loud(hf_lora.wrap(Net(), TARGETS, **{"r": 2, **fields}))


@torch.no_grad()
def answers(model: nn.Module) -> torch.Tensor:
    return model.eval()(X)


def close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def plain(model: Any) -> nn.Module:
    """The model that is meant: all of it in its own tensors, in float64."""
    twin, held = Net().double(), dict(model.named_parameters())
    for path, module in twin.named_modules():
        copied = held.get(f"{path}.lora_copy_bias")
        if copied is not None:
            module.bias.copy_(copied.double())  # type: ignore[union-attr, operator]
        if path in TARGETS:
            a, b = (held[f"{path}.lora_{x}"].double() for x in "AB")
            s = model.get_submodule(path).scaling
            delta = s * (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])
            module.weight += delta.t() if isinstance(module, Conv1D) else delta  # type: ignore[operator]
            on_b = held.get(f"{path}.lora_bias")
            if on_b is not None:
                own = module.bias  # type: ignore[union-attr]
                own = 0.0 if own is None else own
                module.bias = nn.Parameter(own + s * on_b.double())  # type: ignore[operator]
    twin.stats.training = False
    return twin.eval()


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("bias", BIASES)
class TestOneAdapter:
    def test_it_computes_what_it_means(self, bias: str, lora_bias: bool):
        model = wrapped(bias=bias, lora_bias=lora_bias)
        want = plain(model)(X.double())
        assert not torch.equal(answers(model), answers(Net()))
        torch.testing.assert_close(answers(model).double(), want, rtol=1e-5, atol=1e-5)

    def test_gradients_are_those_of_the_plain_formula(self, bias: str, lora_bias: bool):
        model, oracle = (wrapped(bias=bias, lora_bias=lora_bias) for _ in range(2))
        oracle.one.lora_routing.plain = True
        oracle.double()
        model(X).sum().backward()
        oracle(X.double()).sum().backward()
        given = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in given.values())
        for name, parameter in oracle.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(
                    given[name].double(), parameter.grad, rtol=1e-4, atol=1e-5
                )

    def test_it_begins_as_the_base_and_steps_aside_bit_for_bit(self, bias: str, lora_bias: bool):
        base = answers(Net())
        fresh = hf_lora.wrap(Net(), TARGETS, r=2, bias=bias, lora_bias=lora_bias)
        close(answers(fresh), base)
        model = wrapped(bias=bias, lora_bias=lora_bias)
        with hf_lora.no_adapter(model):
            assert torch.equal(answers(model), base)
        assert torch.equal(answers(hf_lora.base_view(model)), base)
        back = hf_lora.unwrap(model)
        assert torch.equal(answers(back), base)
        assert list(back.state_dict()) == list(Net().state_dict())
        assert [type(m) for m in back.modules()] == [type(m) for m in Net().modules()]

    def test_only_what_is_asked_for_trains(self, bias: str, lora_bias: bool):
        model = hf_lora.wrap(Net(), TARGETS, r=2, bias=bias, lora_bias=lora_bias)
        plan = hf_lora.plan(Net(), TARGETS, r=2, bias=bias, lora_bias=lora_bias)
        trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert plan.parameters == sum(p.numel() for p in trains.values())
        assert plan.weight_bytes == sum(p.nbytes for p in trains.values())
        own = {n.removesuffix(".lora_copy_bias") for n in trains if n.endswith("lora_copy_bias")}
        lora_only = {"conv", "one", "two"}
        assert own == {"none": set(), "lora_only": lora_only, "all": ALL}[bias]
        on_b = {n.removesuffix(".lora_bias") for n in trains if n.endswith("lora_bias")}
        assert on_b == (set(TARGETS) if lora_bias else set())
        assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".bias"))

    def test_pefts_file_opens_in_ours_and_ours_in_pefts(
        self, bias: Any, lora_bias: bool, tmp_path: Path
    ):
        model = wrapped(bias=bias, lora_bias=lora_bias)
        hf_lora.save(model, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")  # type: ignore[arg-type]
        close(answers(theirs), answers(model))
        assert torch.equal(answers(hf_lora.load(Net(), tmp_path / "ours")), answers(model))
        config = peft.LoraConfig(r=2, target_modules=TARGETS, bias=bias, lora_bias=lora_bias)
        theirs = loud(peft.get_peft_model(Net(), config))  # type: ignore[arg-type]
        theirs.save_pretrained(tmp_path / "theirs")
        loaded = hf_lora.load(Net(), tmp_path / "theirs")
        close(answers(loaded), answers(theirs))
        hf_lora.save(loaded, tmp_path / "again")
        old, new = (
            TensorFile(tmp_path / name / "adapter_model.safetensors")
            for name in ("theirs", "again")
        )
        assert new.shapes == old.shapes
        mine, others = (dict(file.read(list(file.shapes))) for file in (new, old))
        assert all(torch.equal(mine[key], others[key]) for key in others)
        assert hf_lora.adapters(loaded)["default"].bias == bias
        assert hf_lora.adapters(loaded)["default"].lora_bias == lora_bias

    def test_merging_is_exact_and_undone(self, bias: str, lora_bias: bool):
        model = wrapped(bias=bias, lora_bias=False)
        if lora_bias:  # a layer without a bias has no room for one
            model = loud(
                hf_lora.wrap(Net(), ["conv", "one", "two"], r=2, bias=bias, lora_bias=True)
            )
        want, before = answers(model), dict(model.named_parameters())
        for _ in range(2):
            hf_lora.merge(model)
            close(answers(model), want)
            hf_lora.unmerge(model)
            assert all(p is before[n] for n, p in model.named_parameters())
            assert torch.equal(answers(model), want)
        if bias != "none" and not lora_bias:
            copied = model.one.lora_copy_bias.detach().clone()
            hf_lora.merge(model)
            assert torch.equal(model.one._parameters["bias"], copied)
            hf_lora.unmerge(model)
        close(answers(hf_lora.merge_and_unwrap(model)), want)

    def test_copies_and_pickles_compute_the_same(self, bias: str, lora_bias: bool):
        model = wrapped(bias=bias, lora_bias=lora_bias)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(answers(again), answers(model))

    def test_compiled_it_computes_the_same(self, bias: str, lora_bias: bool):
        torch.compiler.reset()
        model = wrapped(bias=bias, lora_bias=lora_bias)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(answers(compiled), answers(model))
        close(compiled(X).detach(), answers(model))
        hf_lora.add_adapter(model, "b", TARGETS, r=1, bias=bias, lora_bias=lora_bias)
        loud(model)
        for names in ("b", ["default", "b"], "default"):
            hf_lora.activate(model, names)
            close(answers(compiled), answers(model))


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"train": ["two"]}])
def test_a_layer_that_trains_itself_may_read_what_adapted_ones_read(fields: dict[str, Any]):
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) * self.two(x) + self.three(x)

    model = loud(hf_lora.wrap(Three(), ["one", "three"], r=2, **fields)).train()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
    for _ in range(2):
        given = model(x)
    with torch.no_grad():
        torch.testing.assert_close(given, model.eval()(x))
    given.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_biases_are_in_groups_without_decay():
    model = wrapped(bias="all", lora_bias=True)
    groups = hf_lora.optimizer_groups(model, lr=0.1, weight_decay=0.5, b_lr_ratio=4)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("lora_A", 0.1, 0.5),
        ("lora_B", 0.4, 0.5),
        ("trained_no_decay", 0.1, 0.0),
        ("lora_bias", 0.4, 0.0),
    ]
    assert len(groups[2]["params"]) == len(ALL)
    assert len(groups[3]["params"]) == len(TARGETS)


def test_a_bias_alone_does_not_move_running_statistics():
    model = hf_lora.wrap(Net(), TARGETS, r=2, bias="all")
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    model(X).sum().backward()
    assert model.stats.lora_copy_bias.grad is not None
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_summary_and_description_count_them(tmp_path: Path):
    model = wrapped(bias="all", lora_bias=True)
    (one,) = hf_lora.summary(model).adapters
    assert one.biases == len(ALL) + len(TARGETS)
    assert f"biases: {one.biases}" in str(hf_lora.summary(model))
    hf_lora.save(model, tmp_path)
    told = describe(tmp_path)
    assert set(told.biases) == {"norm.bias", "stats.bias", "last.bias"}
    assert told.parameters == one.parameters
    plan = hf_lora.plan(Net(), TARGETS, r=2, bias="all")
    assert any("refuses biases" in reason for reason in plan.vllm)
    assert "bias" in str(plan)


def test_what_has_no_room_for_a_bias_on_b_is_refused_by_name():
    words = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    with pytest.raises(hf_lora.TargetError, match="0: there is no bias on B for layers of its"):
        hf_lora.wrap(words, ["0", "1"], r=2, lora_bias=True)
    model = wrapped(lora_bias=True)
    with pytest.raises(
        hf_lora.TargetError, match=r"bare: B of 'default' has a bias, and the layer"
    ):
        hf_lora.merge(model)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("bias", "some", "not one of none, lora_only, all"), ("lora_bias", 1, "not true or false")],
)
def test_a_wrong_word_is_refused(field: str, value: Any, words: str):
    with pytest.raises(hf_lora.ConfigError, match=words):
        hf_lora.LoRAConfig(**{field: value})


def test_a_shared_bias_is_refused_by_name():
    net = Net()
    net.last.bias = nn.Parameter(torch.zeros(5))
    net.extra = nn.Linear(8, 5)
    net.extra.bias = net.last.bias
    with pytest.raises(
        hf_lora.TargetError, match="the bias of last cannot be trained: it is shared"
    ):
        hf_lora.wrap(net, ["one"], r=2, bias="all")
    hf_lora.wrap(net, ["one"], r=2, bias="lora_only")


class Head(nn.Module):
    """Keeps the bias of the layer in it as its own, too, as BERT's prediction head does."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(8, 5)
        self.bias = self.decoder.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)


@pytest.mark.parametrize("targets", [["one"], ["one", "decoder"]])
def test_a_bias_that_a_head_keeps_too_trains_in_its_layer(targets: list[str], tmp_path: Path):
    def net() -> Any:
        found = Net()
        found.last = Head()  # type: ignore[assignment]
        return found

    config = peft.LoraConfig(r=2, target_modules=targets, bias="all")
    theirs = loud(peft.get_peft_model(net(), config))
    theirs.save_pretrained(tmp_path)
    model = hf_lora.load(net(), tmp_path)
    close(answers(model), answers(theirs))
    hf_lora.save(model, tmp_path / "ours")
    close(answers(peft.PeftModel.from_pretrained(net(), tmp_path / "ours")), answers(theirs))
    with torch.no_grad():
        assert torch.equal(hf_lora.unwrap(model)(X), net().eval()(X))


def test_an_engine_gets_the_biases_too():
    model = loud(hf_lora.wrap(Net(), ["conv", "one", "two"], r=2, bias="all", lora_bias=True))
    twin = Net()
    twin.load_state_dict(dict(merged_tensors(model)), strict=False)
    close(answers(twin), answers(model))


def test_on_a_4_bit_base_biases_stay_as_they_are():
    bnb = pytest.importorskip("bitsandbytes")

    def net() -> Any:
        found = Net()
        layer = bnb.nn.Linear4bit(8, 6, compute_dtype=torch.float32, quant_type="nf4")
        layer.load_state_dict(found.one.state_dict())
        found.one = layer.to("cpu")
        return found

    base = net()
    model = loud(hf_lora.wrap(net(), ["one"], r=2, bias="all", lora_bias=True))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
    layer = model.one
    low = layer.scaling * (x @ layer.lora_A.t() @ layer.lora_B.t() + layer.lora_bias)
    with torch.no_grad():
        want = base.one(x) + low + (layer.lora_copy_bias - base.one.bias)
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
        with hf_lora.no_adapter(model):
            assert torch.equal(layer(x), base.one(x))
    assert layer.lora_copy_bias.dtype == torch.float32
    other = loud(hf_lora.wrap(net(), ["two"], r=2, bias="all"))
    before = other.one.lora_copy_bias.detach().clone()
    other.one(x)
    assert torch.equal(other.one.lora_copy_bias, before)
    with torch.no_grad():
        twin = net().one
        twin.bias.copy_(before)
        torch.testing.assert_close(other.one(x), twin(x))


def test_in_half_precision_the_copies_keep_float32():
    model = hf_lora.wrap(Net().bfloat16(), TARGETS, r=2, bias="all", lora_bias=True)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trains} == {torch.float32}
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    F.mse_loss(out.float(), torch.zeros(())).backward()
    assert all(p.grad is not None for p in trains)
