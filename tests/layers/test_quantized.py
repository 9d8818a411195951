"""Quantized bases train, also after an eval forward; those made for inference only are refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import hf_lora
from hf_lora import HfLoRAWarning, TargetError
from hf_lora.layers.quantized import float_weight
from tests.snapshot import digest

WIDTH = 64  # bitsandbytes' block
TOKENS = torch.arange(12).view(2, 6)


class Net(nn.Module):
    """Two layers that are quantized with a norm between them, and a head that is not."""

    def __init__(self, layer: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(1)
        self.down, self.norm, self.up = layer(), nn.LayerNorm(WIDTH), layer()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.norm(self.down(x))))


def four_bit(**options: object) -> Net:
    """Return a hand-made 4-bit model."""
    return Net(lambda: bnb.nn.Linear4bit(WIDTH, WIDTH, **options)).to("cpu")  # type: ignore[arg-type]


def eight_bit() -> Net:
    return Net(lambda: bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)).to("cpu")


def torchao(config: object) -> Net:
    model = Net(lambda: nn.Linear(WIDTH, WIDTH))
    quantize_(model, config, filter_fn=lambda m, name: name in ("down", "up"))  # type: ignore[arg-type]
    return model


MODELS: dict[str, Callable[[], Net]] = {
    "4-bit fp4": four_bit,
    "4-bit nf4 bf16": lambda: four_bit(quant_type="nf4", compute_dtype=torch.bfloat16),
    "4-bit nf4 no bias": lambda: four_bit(quant_type="nf4", bias=False),
    "8-bit": eight_bit,
    "torchao int8": lambda: torchao(Int8WeightOnlyConfig()),
    "torchao intx": lambda: torchao(IntxWeightOnlyConfig()),
    "torchao float8": lambda: torchao(Float8WeightOnlyConfig()),
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


def weights(model: nn.Module) -> dict[str, str]:
    """Return the hash of everything that makes up the base, packed or not."""
    return {
        f"{name}.{part}": digest(tensor)
        for name, parameter in model.named_parameters()
        if "lora" not in name
        for part, tensor in parts(parameter)
    }


def parts(parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the plain tensors that a quantized one consists of."""
    if hasattr(parameter, "__tensor_flatten__"):
        return [(name, getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0]]
    state = getattr(parameter, "quant_state", None)
    return [("data", parameter.data), *([("absmax", state.absmax)] if state else [])]


@each_model
def test_a_quantized_base_trains(make: Callable[[], Net]):
    """Also after an eval forward, before wrapping or after: every step has all gradients."""
    model = make().eval()
    model(rows())  # bitsandbytes would pack the weights for inference here
    target = torch.randn(8, 4)
    hf_lora.wrap(model, targets=["down", "up"], r=4)
    before = weights(model)
    assert model.down.lora_A.shape == (4, WIDTH)
    assert model.down.lora_B.shape == (WIDTH, 4)
    assert model.down.lora_A.dtype == torch.float32
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 4
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    losses = []
    for _ in range(12):
        model.eval()
        with torch.no_grad():
            model(rows())
        model.train()
        optimizer.zero_grad()
        loss = (model(rows()) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.any() for p in parameters)
    assert losses[-1] < 0.9 * losses[0]
    assert weights(model) == before


@each_model
def test_the_adapter_is_what_is_added_and_taken_off(make: Callable[[], Net]):
    model = make().train()
    hf_lora.wrap(model, targets=["down", "up"], r=4, alpha=8.0)
    layer, x = model.down, rows()
    with torch.no_grad():
        base = layer(x)
        nn.init.normal_(layer.lora_B)
        update = 2 * x @ layer.lora_A.T @ layer.lora_B.T
        assert torch.allclose(layer(x), base + update, atol=0.05)
        assert torch.allclose(layer.base(x), base, atol=1e-6)
        adapted = model(x)
        assert torch.equal(copy.deepcopy(model)(x), adapted)
        with hf_lora.no_adapter(model):
            plain = model(x)
    host = type(make().down)
    hf_lora.unwrap(model)
    assert type(model.down) is host
    with torch.no_grad():
        assert torch.equal(model(x), plain)
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in make().parameters()
    ]


@each_model
def test_a_merge_is_refused_and_changes_nothing(make: Callable[[], Net]):
    model = make().train()
    hf_lora.wrap(model, targets=["down", "head"], r=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    y, before = model(rows()), weights(model)
    for verb in (hf_lora.merge, hf_lora.merge_and_unwrap):
        with pytest.raises(TargetError) as caught:
            verb(model)
        assert str(caught.value).count("\n  - ") == 1
        assert "down: its base" in str(caught.value)
        assert "quantized or packed" in str(caught.value)
    assert weights(model) == before
    assert torch.equal(model(rows()), y)
    assert hf_lora.active_adapters(model) == ("default",)


@pytest.mark.parametrize("options", [{}, {"quant_type": "nf4", "compress_statistics": False}])
def test_a_merge_may_round_four_bits_anew_and_says_what_is_lost(options: dict):
    model = four_bit(**options)
    base = model(rows())
    hf_lora.wrap(model, ["down", "up"], r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.5)
    before, kept, wanted = weights(model), model.down.weight, model(rows())
    exact = [float_weight(layer) + layer.lora_delta("default") for layer in (model.down, model.up)]
    with pytest.warns(HfLoRAWarning, match=r"2 packed layers .* rounded anew: the error is (\d+)%"):
        hf_lora.merge(model, requantize=True)
    for layer, total in zip((model.down, model.up), exact, strict=True):
        after = float_weight(layer)
        assert (after - total).norm() < 0.15 * total.norm()
        assert layer.weight.quant_state.nested == kept.quant_state.nested
    merged = model(rows())
    assert (merged - wanted).norm() < (base - wanted).norm()
    hf_lora.unmerge(model)
    assert model.down.weight is kept
    assert weights(model) == before
    assert torch.equal(model(rows()), wanted)


@pytest.mark.parametrize("make", [eight_bit, MODELS["torchao int8"]], ids=["8-bit", "torchao"])
def test_other_packed_weights_are_not_rounded_anew(make: Callable[[], Net]):
    model = hf_lora.wrap(make(), ["down"], r=2)
    with pytest.raises(TargetError, match="not in 4 bits of bitsandbytes"):
        hf_lora.merge(model, requantize=True)


@each_model
def test_wrapping_leaves_the_base_as_it_was(make: Callable[[], Net]):
    """Also the state that such a layer keeps beside its weight, which a trial run would change."""
    model = make()

    def facts() -> list[object]:
        layer = model.down
        held = ("compute_dtype", "compute_type_is_set", "state", "CB", "SCB", "quant_state")
        state = vars(getattr(layer, "state", nn.Module()))
        return [
            layer.weight,
            *(getattr(owner, name, None) for owner in (layer, layer.weight) for name in held),
            *(state.get(name) for name in ("CB", "SCB", "is_training")),
        ]

    before = facts()
    digests = weights(model)
    hf_lora.wrap(model, targets=["down", "up"], r=4)
    assert weights(model) == digests
    assert all(now is then for now, then in zip(facts(), before, strict=True))


@pytest.mark.parametrize("make", [four_bit, eight_bit], ids=["4-bit", "8-bit"])
def test_the_float_weight_of_a_packed_one(make: Callable[[], Net]):
    torch.manual_seed(1)
    exact = nn.Linear(WIDTH, WIDTH).weight
    model = make()
    for _ in range(2):  # before the first forward and after it, which moves what 8-bit keeps
        weight = float_weight(model.down)
        assert weight is not None
        assert (weight - exact).norm() / exact.norm() < 0.2
        with torch.no_grad():
            model.train()(rows())


def test_the_plan_of_a_four_bit_model_counts_numbers_not_bytes():
    model = four_bit(compress_statistics=False)
    plan = hf_lora.plan(model, targets="down", r=4)
    plain = Net(lambda: nn.Linear(WIDTH, WIDTH))
    assert plan.base_parameters == sum(p.numel() for p in plain.parameters())
    assert plan.base_bytes < 4 * plan.base_parameters
    ao = hf_lora.plan(torchao(Int8WeightOnlyConfig()), targets="down", r=4)
    assert ao.base_parameters == plan.base_parameters
    assert 2 * WIDTH * WIDTH < ao.base_bytes < 4 * ao.base_parameters
    assert [(t.path, t.dtype, t.slot) for t in ao.targets] == [
        (t.path, t.dtype, t.slot) for t in plan.targets
    ]


DYNAMIC = [Int8DynamicActivationInt8WeightConfig, Int8DynamicActivationIntxWeightConfig]


@pytest.mark.parametrize("config", DYNAMIC, ids=lambda c: c.__name__)
def test_a_base_without_a_backward_is_refused_with_the_reason(config: type):
    model = torchao(config())
    before = weights(model)
    with pytest.raises(TargetError) as caught:
        hf_lora.wrap(model, targets=["down", "up"], r=4)
    assert "down (Linear): its backward gives no gradient to its input" in str(caught.value)
    assert "up (Linear)" in str(caught.value)
    assert type(model.down) is nn.Linear
    assert weights(model) == before
    assert model.head.weight.requires_grad


def test_of_two_kinds_only_the_one_without_a_backward_is_refused():
    """The class, and the class of the weight, are the same for both."""
    model = torchao(Int8WeightOnlyConfig())
    model.up = torchao(Int8DynamicActivationInt8WeightConfig()).up
    with pytest.raises(TargetError) as caught:
        hf_lora.wrap(model, targets=["down", "up"], r=4)
    assert "up (Linear)" in str(caught.value)
    assert "down (Linear)" not in str(caught.value)


def test_a_layer_without_a_backward_above_the_targets_is_told():
    model = torchao(Int8WeightOnlyConfig())
    model.up = torchao(Int8DynamicActivationInt8WeightConfig()).up
    with pytest.warns(HfLoRAWarning, match=r"(?s)Nothing below these layers.*up \(Linear\)"):
        hf_lora.wrap(model, targets="down", r=4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pytorchs_own_dynamic_quantization_is_refused():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    with pytest.raises(TargetError, match="its backward gives no gradient"):
        hf_lora.wrap(model, targets="0", r=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny Llama to load it quantized."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


QLORA = {
    "4-bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "8-bit": {"load_in_8bit": True},
}


@pytest.mark.parametrize("options", QLORA.values(), ids=QLORA.keys())
def test_a_model_that_transformers_quantized(checkpoint: Path, options: dict):
    model = LlamaForCausalLM.from_pretrained(
        checkpoint, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    with torch.no_grad():
        base = model(TOKENS).logits
    hf_lora.wrap(model, r=4)
    plan = hf_lora.plan(model, r=4)
    assert plan.matches == {"all-linear": 14}
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 28
    with torch.no_grad():
        assert torch.allclose(model(TOKENS).logits, base, atol=0.05)
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            model.eval()(TOKENS)
        model.train()
    assert losses[-1] < losses[0]
