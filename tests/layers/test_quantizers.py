"""Layers of other libraries' quantizers do what the docs' table says of them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.errors import BaseMismatchError, TargetError
from hf_lora.layers.quantized import float_weight
from tests.snapshot import digest

WIDTH = 64
PAGE = Path(__file__).parents[2] / "examples/docs/reference/quantized.md"


def dense() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(WIDTH, WIDTH)


def hqq(bits: int, **options: object) -> nn.Module:
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=bits, group_size=64, **options)
    return core.HQQLinear(
        dense().requires_grad_(False),
        quant_config=config,
        compute_dtype=torch.float32,
        device="cpu",
    )


class TorchLinear(nn.Module):
    """What gptqmodel's layers are to others: packed numbers in buffers, and no weight."""

    qweight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor

    def __init__(self):
        super().__init__()
        linear = dense()
        self.in_features = self.out_features = WIDTH
        weight = linear.weight.detach()
        scales = weight.abs().amax(1) / 7
        whole = (weight / scales[:, None]).round().clamp(-8, 7).int().t() + 8  # (in, out)
        packed = torch.zeros(WIDTH // 8, WIDTH, dtype=torch.int32)
        for n in range(8):
            packed |= whole[n::8] << (4 * n)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", linear.bias.detach())

    def dequantize_weight(self) -> torch.Tensor:
        found = torch.empty(WIDTH, WIDTH)
        for n in range(8):
            found[n::8] = ((self.qweight >> (4 * n)) & 15).float() - 8
        return found * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.dequantize_weight() + self.bias


TorchLinear.__module__ = "gptqmodel.nn_modules.qlinear.torch"


class FP8Linear(nn.Linear):
    """What transformers' is to others: float8 numbers, and a scale for each block of them."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.block_size = (32, 32)
        linear = dense()
        blocks = linear.weight.detach().unflatten(0, (2, 32)).unflatten(2, (2, 32))
        scale = blocks.abs().amax((1, 3)) / 448
        whole = (blocks / scale[:, None, :, None]).reshape(WIDTH, WIDTH)
        self.weight = nn.Parameter(whole.to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scale = self.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return nn.functional.linear(input, self.weight.float() * scale, self.bias)


FP8Linear.__module__ = "transformers.integrations.finegrained_fp8"

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "HQQ": lambda: hqq(4),
    "HQQ 8-bit": lambda: hqq(8),
    "HQQ 2-bit": lambda: hqq(2),
    "GPTQ and AWQ": TorchLinear,
    "FP8": FP8Linear,
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def rows() -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))


def model_of(layer: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 4))


@torch.no_grad()
def loud(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1)
    return model


def held(model: nn.Module) -> dict[str, str]:
    return {n: digest(t) for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


@each_layer
def test_it_trains_saves_loads_and_is_taken_off(make: Callable[[], nn.Module], tmp_path: Path):
    model = model_of(make())
    plain, before = model(rows()), held(model)
    hf_lora.wrap(model, "1", r=2)
    assert torch.equal(model(rows()), plain)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(rows()).square().mean().backward()
        optimizer.step()
    assert held(model).items() >= before.items()
    adapted = loud(model)(rows())
    hf_lora.save(model, tmp_path)
    hf_lora.unwrap(model)
    assert held(model) == before
    assert torch.equal(model(rows()), plain)
    torch.testing.assert_close(hf_lora.load(model, tmp_path)(rows()), adapted)


@each_layer
def test_its_numbers_are_those_that_it_computes_with(make: Callable[[], nn.Module]):
    layer = make()
    weight = float_weight(layer)
    assert weight is not None
    wanted = layer(rows()) - layer.bias
    torch.testing.assert_close(rows() @ weight.t().float(), wanted, rtol=1e-3, atol=1e-3)


@each_layer
def test_it_is_counted_as_what_it_stands_for(make: Callable[[], nn.Module]):
    plain, model = hf_lora.plan(model_of(dense()), "1"), hf_lora.plan(model_of(make()), "1")
    assert model.parameters == plain.parameters
    extra = model.base_parameters - plain.base_parameters
    assert abs(extra) <= WIDTH  # the scales of blocks, or a bias in a buffer
    assert model.base_bytes < plain.base_bytes


@each_layer
def test_merging_is_refused_by_name(make: Callable[[], nn.Module]):
    model = loud(hf_lora.wrap(model_of(make()), "1", r=2))
    wanted = model(rows())
    for requantize in (False, True):
        with pytest.raises(TargetError, match=r"1: its (base|weight)"):
            hf_lora.merge(model, requantize=requantize)
    assert torch.equal(model(rows()), wanted)


def test_compressed_tensors_says_how_to_load_it_instead():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = model_of(dense())
    scheme = quantization.QuantizationScheme(
        targets=["re:^1$"],
        weights=quantization.QuantizationArgs(num_bits=8, strategy="channel", symmetric=True),
    )
    config = quantization.QuantizationConfig(config_groups={"all": scheme})
    quantization.apply_quantization_config(model, config)
    with pytest.raises(TargetError, match=r"CompressedTensorsConfig\(dequantize=True\)"):
        hf_lora.wrap(model, "1", r=2)


def test_packed_experts_of_another_kind_are_told_and_the_rest_is_adapted():
    class Mxfp4GptOssExperts(nn.Module):
        def __init__(self):
            super().__init__()
            blocks = torch.zeros(4, WIDTH, 2, 16, dtype=torch.uint8)
            self.gate_up_proj_blocks = nn.Parameter(blocks, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = nn.ModuleDict({"q_proj": dense(), "experts": Mxfp4GptOssExperts()})
    assert [t.path for t in hf_lora.plan(model, "all-linear").targets] == ["q_proj"]
    with pytest.raises(TargetError, match="Mxfp4GptOssExperts"):
        hf_lora.wrap(model, "experts.gate_up_proj_blocks", r=2)


@each_layer
def test_the_base_is_recognized_packed_or_not_and_another_is_not(
    make: Callable[[], nn.Module], tmp_path: Path
):
    hf_lora.save(loud(hf_lora.wrap(model_of(make()), "1", r=2)), tmp_path / "packed")
    hf_lora.save(loud(hf_lora.wrap(model_of(dense()), "1", r=2)), tmp_path / "full")
    for folder in ("packed", "full"):
        for layer in (make(), dense()):
            hf_lora.load(model_of(layer), tmp_path / folder)
    other = dense()
    with torch.no_grad():
        other.weight.mul_(-1)
    with pytest.raises(BaseMismatchError, match=r"1\.weight"):
        hf_lora.load(model_of(other), tmp_path / "packed")


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_table_says_what_is_tested_here():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    table = {cells[0]: cells for cells in map(cells_of, lines)}
    for name in LAYERS:
        first = name.split()[0].rstrip(",")
        cells = next(cells for row, cells in table.items() if row.split()[0].rstrip(",") == first)
        assert cells[2].startswith("yes")
        assert cells[3] == "yes"
        assert cells[4] == "refused"
        stands_in = cells[5] == "a layer of its surface"
        assert stands_in == (name in ("GPTQ and AWQ", "FP8"))
    assert all(re.fullmatch(r"the library|a layer of its surface", c[5]) for c in table.values())
