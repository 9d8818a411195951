"""Layers whose weights are read: updates reach whoever reads them, and the base is not written."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

import hf_lora
from hf_lora.kinds.reading import LoRAAttention, ReadLinear
from hf_lora.layers import reading
from hf_lora.merging.hand_over import merged_tensors

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Called(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Layer(nn.TransformerEncoderLayer):
    """Likewise."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs)


class Attentive(nn.Module):
    def __init__(self, kind: type = nn.MultiheadAttention, **fields: Any):
        super().__init__()
        self.attn = kind(8, 2, **{"batch_first": True, **fields})
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x, x, x)[0])


class Crossed(Attentive):
    """Queries are not the keys, so that there is no fast path."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x.flip(1), x, x)[0])


def encoder(kind: type = nn.TransformerEncoderLayer, **fields: Any) -> nn.Module:
    layer = kind(8, 2, 16, dropout=0.0, batch_first=True, **fields)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x.flip(1))


FULL = ["self_attn", "linear1", "linear2"]
MODELS: dict[str, tuple[Any, list[str]]] = {
    "attention": (Attentive, ["attn", "head"]),
    "without biases": (lambda: Attentive(bias=False), ["attn"]),
    "of two inputs": (Crossed, ["attn"]),
    "a subclass": (lambda: Attentive(Called), ["attn"]),
    "bias_k": (lambda: Attentive(add_bias_kv=True, add_zero_attn=True), ["attn"]),
    "encoder": (encoder, FULL),
    "norms first": (lambda: encoder(norm_first=True), FULL),
    "its layers alone": (encoder, ["linear1", "linear2"]),
    "a subclass of encoders'": (lambda: encoder(Layer), FULL),
    "decoder": (Decoder, [*FULL, "multihead_attn"]),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@torch.no_grad()
def loud(model: Any, seed: int = 2) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def wrapped(name: str, **fields: Any) -> Any:
    return loud(hf_lora.wrap(built(name), MODELS[name][1], **{"r": 2, "alpha": 4.0, **fields}))


def ways(model: nn.Module) -> list[torch.Tensor]:
    """What it answers: in training, in eval mode, and there without gradients (the fast path)."""
    found = [model.train()(X).detach(), model.eval()(X).detach()]
    with torch.no_grad():
        return [*found, model(X)]


def close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def dense(name: str, model: Any) -> Any:
    """The plain model with the updates in its weights, in float64."""
    twin = built(name).double()
    for path, module in model.named_modules():
        if hasattr(module, "lora_slots"):
            weight = "in_proj_weight" if hasattr(module, "in_proj_weight") else "weight"
            s = module.lora_slots["default"].scaling
            delta = s * module.lora_B.double() @ module.lora_A.double()
            own = dict(twin.get_submodule(path).named_parameters(recurse=False))[weight]
            own += delta
    return twin


@pytest.mark.parametrize("name", MODELS)
class TestEachModel:
    def test_every_way_of_computing_has_the_updates(self, name: str):
        model = wrapped(name)
        want = dense(name, model).eval()(X.double()).detach()
        for given in ways(model):
            torch.testing.assert_close(given.double(), want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(want.float(), built(name).eval()(X), atol=1e-2)

    def test_gradients_are_those_of_the_weights_that_are_meant(self, name: str):
        model = wrapped(name).train()
        twin = dense(name, model).train()
        model(X).square().sum().backward()
        twin(X.double()).square().sum().backward()
        for path, module in model.named_modules():
            if not hasattr(module, "lora_slots"):
                continue
            s, own = module.lora_slots["default"].scaling, twin.get_submodule(path)
            g = (own.in_proj_weight if hasattr(own, "in_proj_weight") else own.weight).grad
            for given, want in (
                (module.lora_A.grad, s * module.lora_B.detach().double().t() @ g),
                (module.lora_B.grad, s * g @ module.lora_A.detach().double().t()),
            ):
                torch.testing.assert_close(given.double(), want, rtol=1e-3, atol=1e-3)

    def test_the_base_is_not_written_and_comes_back(self, name: str):
        base, model = built(name), wrapped(name)
        ways(model)
        own = dict(base.named_parameters())
        there = {n: p for n, p in model.named_parameters() if n in own}
        assert there.keys() == own.keys()
        assert all(torch.equal(p, own[n]) for n, p in there.items())
        # of what is frozen the fast path is taken with gradients as well
        frozen = copy.deepcopy(base).requires_grad_(False)
        with hf_lora.no_adapter(model):
            assert all(map(torch.equal, ways(model), ways(frozen)))
        assert list(hf_lora.unwrap(model).state_dict()) == list(base.state_dict())
        assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
        assert all(map(torch.equal, ways(model), ways(base)))

    def test_merging_gives_the_very_weights_that_were_read(self, name: str):
        model = wrapped(name)
        want = ways(model)[2]
        read = {
            (path, role): getattr(module, role).detach()
            for path, module in model.named_modules()
            for role in ("in_proj_weight", "weight")
            if isinstance(module, (LoRAAttention, ReadLinear)) and hasattr(module, role)
        }
        hf_lora.merge(model)
        for (path, role), weight in read.items():
            assert torch.equal(model.get_submodule(path)._parameters[role], weight)
        close(ways(model)[2], want)
        hf_lora.unmerge(model)
        assert torch.equal(ways(model)[2], want)
        twin = built(name)
        twin.load_state_dict(dict(merged_tensors(model)))
        close(ways(twin)[2], want)
        plain = hf_lora.merge_and_unwrap(model)
        assert [type(m) for m in plain.modules()] == [type(m) for m in built(name).modules()]
        close(ways(plain)[2], want)

    def test_our_file_in_ours_and_in_pefts_and_pefts_in_ours(self, name: str, tmp_path: Path):
        model = wrapped(name)
        hf_lora.save(model, tmp_path / "ours")
        again = hf_lora.load(built(name), tmp_path / "ours")
        close(ways(again)[2], ways(model)[2])
        hf_lora.save(again, tmp_path / "again")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            first, second = (tmp_path / folder / file for folder in ("ours", "again"))
            assert first.read_bytes() == second.read_bytes()
        # in eval mode PEFT's layers are passed over by the fast path of encoder layers
        theirs = peft.PeftModel.from_pretrained(built(name), tmp_path / "ours")
        close(theirs.train()(X).detach(), ways(model)[0])
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=MODELS[name][1])
        made = loud(peft.get_peft_model(built(name), config))
        made.save_pretrained(tmp_path / "theirs")
        loaded = hf_lora.load(built(name), tmp_path / "theirs")
        close(ways(loaded)[0], made.train()(X).detach())
        hf_lora.wrap(built(name), config=hf_lora.adapters(loaded)["default"])

    def test_copies_compute_the_same(self, name: str):
        model = wrapped(name)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(map(torch.equal, ways(again), ways(model)))


def test_several_adapters_add_up():
    model = wrapped("encoder")
    hf_lora.add_adapter(model, "b", FULL, r=1)
    loud(model)
    hf_lora.activate(model, {"default": 0.5, "b": 2.0})
    weight = built("encoder").layers[0].self_attn.in_proj_weight
    attention = model.layers[0].self_attn
    for name, factor in (("default", 0.5), ("b", 2.0)):
        weight = weight + factor * attention.lora_delta(name)
    close(attention.in_proj_weight.detach(), weight.detach())
    train, evaluated, fast = ways(model)
    close(evaluated, train)
    close(fast, train)
    hf_lora.merge(model, {"b": 2.0})
    close(ways(model)[2], fast)


def test_padding_in_nested_tensors_goes_the_fast_path_with_the_updates():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = loud(hf_lora.wrap(nn.TransformerEncoder(layer, 2), FULL, r=2)).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    slow = model(X, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = model(X, src_key_padding_mask=padding)
    close(fast[~padding], slow.detach()[~padding])


def test_biases_of_read_layers_are_read_with_theirs():
    model = wrapped("encoder", bias="all")
    assert any("linear1.lora_copy_bias" in name for name, _ in model.named_parameters())
    train, evaluated, fast = ways(model)
    close(evaluated, train)
    close(fast, train)
    one = model.layers[0]
    for layer in (one.self_attn.out_proj, one.linear1, one.norm1):
        close(layer.bias.detach(), layer.lora_copy_bias.detach())
    theirs = wrapped("attention", bias="lora_only", lora_bias=False)
    assert theirs.attn.out_proj.lora_copy_bias.requires_grad


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_compiled_it_computes_the_same(name: str):
    torch.compiler.reset()
    model = wrapped(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for given, want in zip(ways(compiled), ways(model), strict=True):
        close(given, want)


def test_a_weight_is_computed_once_in_a_forward(monkeypatch: pytest.MonkeyPatch):
    model = wrapped("attention").train()
    made: list[str] = []
    before = reading.stored
    monkeypatch.setattr(
        reading, "stored", lambda module, name: made.append(name) or before(module, name)
    )
    model.attn(X, X, X)
    assert sorted(made) == ["bias", "in_proj_weight", "weight"]


def test_in_half_precision_sums_are_rounded_once():
    model = loud(hf_lora.wrap(built("attention").bfloat16(), ["attn"], r=2))
    attention = model.attn
    want = built("attention").attn.in_proj_weight.bfloat16().float()
    want = (want + attention.lora_delta("default")).bfloat16()
    assert torch.equal(attention.in_proj_weight, want)
    assert attention.lora_A.dtype == torch.float32
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_a_pooling_head_of_transformers_is_adapted(tmp_path: Path):
    def vision() -> Any:
        torch.manual_seed(0)
        config = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        return SiglipVisionModel(config).eval()

    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = ["q_proj", r"head\.attention"]
    model = loud(hf_lora.wrap(vision(), targets, r=2)).eval()
    assert not torch.equal(model(pixels).pooler_output, vision()(pixels).pooler_output)
    with torch.no_grad():
        close(model(pixels).pooler_output, model.train()(pixels).pooler_output)
    hf_lora.save(model, tmp_path)
    config = peft.PeftModel.from_pretrained(vision(), tmp_path)
    with torch.no_grad():
        close(config(pixels).pooler_output, model.eval()(pixels).pooler_output)


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (Attentive, {"targets": ["out_proj"]}, r"name the attention \(attn\), of which all weights"),
    (lambda: Attentive(kdim=6, vdim=6), {"targets": ["attn"]}, r"of other widths \(kdim, vdim\)"),
    (Attentive, {"targets": ["attn"], "dropout": 0.1}, "there is no input to drop elements of"),
    (Attentive, {"targets": ["attn"], "lora_bias": True}, "there is no bias on B for layers"),
    (Attentive, {"targets": ["attn"], "r": 9}, "r=9 is larger than the attention's width, 8"),
    (
        Attentive,
        {"targets": ["attn"], "overrides": {"out_proj": {"r": 1}}},
        r"attn\.out_proj: it has the numbers of attn: name that in overrides",
    ),
]


@pytest.mark.parametrize(("make", "fields", "words"), WRONG)
def test_what_cannot_be_is_refused_by_name(make: Any, fields: dict[str, Any], words: str):
    model = make()
    with pytest.raises(hf_lora.TargetError, match=words):
        hf_lora.wrap(model, **{"r": 2, **fields})
    assert type(model.attn) is nn.MultiheadAttention


def test_all_linear_tells_how_an_attention_is_named():
    with pytest.warns(hf_lora.HfLoRAWarning, match=r"attn\.out_proj .*name the attention \(attn\)"):
        hf_lora.wrap(Attentive(), r=2)
    plan = hf_lora.plan(encoder(), r=2)
    assert {t.path.rpartition(".")[2] for t in plan.targets} == {"linear1", "linear2"}


def test_the_last_layer_of_an_attention_may_be_left_out(tmp_path: Path):
    model = loud(hf_lora.wrap(built("attention"), ["attn"], exclude=["out_proj"], r=2))
    assert type(model.attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    hf_lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(built("attention"), tmp_path)
    close(ways(theirs)[2], ways(model)[2])
    assert torch.equal(ways(hf_lora.load(built("attention"), tmp_path))[2], ways(model)[2])
