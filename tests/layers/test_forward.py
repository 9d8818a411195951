"""What a patched layer computes, against the formula in float64, however it is called."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_lora
from hf_lora.functional.init import init_low_rank
from hf_lora.functional.low_rank import dense, low_rank, product, scaling
from tests.rounding import assert_rounded_alike

IN, OUT, R = 12, 20, 3


def layer(base: torch.dtype = torch.float32, **fields: object) -> nn.Linear:
    """Return a patched linear layer whose adapter says something."""
    model = nn.Sequential(nn.Linear(IN, OUT, dtype=base))
    hf_lora.wrap(model, targets="0", r=R, alpha=5.0, **fields)
    nn.init.normal_(model[0].lora_B)
    return model[0]


def expected(layer: nn.Module, x: torch.Tensor, s: float = 5 / R) -> torch.Tensor:
    """Return the layer's answer in float64: W x + b + s B A x."""
    weight, bias, a, b = (
        t.detach().double() for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B)
    )
    return x.double() @ (weight + s * b @ a).T + bias


def plain(layer: nn.Module, x: torch.Tensor, s: float = 5 / R) -> torch.Tensor:
    """Return the layer's answer by the formula in PyTorch's operations, in the input's type."""
    weight, bias = (t.detach().to(x.dtype) for t in (layer.weight, layer.bias))
    update = low_rank(x, layer.lora_A.detach(), layer.lora_B.detach(), s)
    return F.linear(x, weight, bias) + update


def assert_answers(layer: nn.Module, x: torch.Tensor, s: float = 5 / R) -> None:
    assert_rounded_alike((layer(x), plain(layer, x, s), expected(layer, x, s)))


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert scaling(4, 8.0) == 2.0
    assert scaling(4, 8.0, rslora=True) == 4.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_answer_is_that_of_the_formula(dtype: torch.dtype):
    one = layer(dtype)
    x = torch.randn(7, IN, dtype=dtype)
    assert one(x).dtype == dtype
    assert_answers(one, x)


def test_rslora_scales_by_the_root():
    one = layer(rslora=True)
    x = torch.randn(7, IN)
    assert_answers(one, x, 5 / R**0.5)


def test_the_low_rank_product_is_one_formula():
    a, b, x = torch.randn(R, IN), torch.randn(OUT, R), torch.randn(4, IN)
    exact = low_rank(x.double(), a.double(), b.double(), 0.5)
    assert_rounded_alike((low_rank(x, a, b, 0.5), x @ dense(product(a, b, 0.5)).T, exact))
    assert torch.equal(exact, low_rank(x.double(), a, b, 0.5))
    assert dense(product(a.bfloat16(), b.half(), 1.0)).dtype == torch.float32
    assert dense(product(a.double(), b.double(), 1.0)).dtype == torch.float64


def test_a_starts_within_its_bounds_and_b_at_zero():
    a, b = torch.empty(64, 400), torch.empty(8, 64)
    init_low_rank(a, b, "kaiming")
    assert a.abs().max() <= 1 / 400**0.5
    assert a.std() == pytest.approx(1 / 400**0.5 / 3**0.5, rel=0.05)
    assert not b.any()
    init_low_rank(a, b, "gaussian")
    assert a.std() == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize(
    "shape", [(IN,), (0, IN), (1, IN), (2, 3, IN), (2, 0, 5, IN), (2, 1, 1, 3, IN)]
)
def test_every_shape_that_a_linear_layer_takes(shape: tuple[int, ...]):
    one, x = layer(), torch.randn(shape)
    assert one(x).shape == (*shape[:-1], OUT)
    assert_answers(one, x)


def test_an_input_that_is_not_contiguous():
    one, x = layer(), torch.randn(IN, 3, 5).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_answers(one, x)
    assert_answers(one, x.expand(2, 5, 3, IN))


def test_a_wrong_input_fails_as_the_plain_layer_does():
    for call in (
        lambda m: m(torch.randn(2, IN + 1)),
        lambda m: m(),
        lambda m: m(torch.ones(2, IN).int()),
    ):
        with pytest.raises((RuntimeError, TypeError)) as plain:
            call(nn.Linear(IN, OUT))
        with pytest.raises(type(plain.value)):
            call(layer())


def test_the_input_may_be_passed_by_name():
    one, x = layer(), torch.randn(2, IN)
    assert torch.equal(one(input=x), one(x))
    model = nn.Sequential(Conv1D(OUT, IN))
    hf_lora.wrap(model, targets="0", r=R)
    nn.init.normal_(model[0].lora_B)
    assert torch.equal(model[0](x=x), model[0](x))
    assert not torch.equal(model[0](x), model[0].base(x))


def test_gradients_are_those_of_the_formula():
    one = layer()
    x = torch.randn(6, IN, requires_grad=True)
    one(x).square().sum().backward()
    assert one.weight.grad is None
    assert one.bias.grad is None

    def by_formula(dtype: torch.dtype) -> list[torch.Tensor]:
        z, a, b = (t.detach().to(dtype).requires_grad_() for t in (x, one.lora_A, one.lora_B))
        y = F.linear(z, one.weight.to(dtype), one.bias.to(dtype)) + 5 / R * (z @ a.T) @ b.T
        return list(torch.autograd.grad(y.square().sum(), [z, a, b]))

    found = [x.grad, one.lora_A.grad, one.lora_B.grad]
    assert_rounded_alike((found, by_formula(torch.float32), by_formula(torch.float64)))


def test_sixteen_bit_bases_train_in_float32():
    one = layer(torch.bfloat16)
    assert one.lora_A.dtype == one.lora_B.dtype == torch.float32
    one(torch.randn(6, IN, dtype=torch.bfloat16)).sum().backward()
    assert one.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapters_of_any_dtype_on_any_base(dtype: str):
    for base in (torch.float32, torch.bfloat16):
        one = layer(base, dtype=dtype)
        assert one.lora_A.dtype == getattr(torch, dtype)
        x = torch.randn(5, IN, dtype=base)
        assert one(x).dtype == base
        assert_answers(one, x)


def test_adapters_of_different_dtypes_add_up():
    model = nn.Sequential(nn.Linear(IN, OUT))
    hf_lora.wrap(model, targets="0", r=R, dtype="float16")
    hf_lora.add_adapter(model, "b", "0", r=R, dtype="bfloat16")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    hf_lora.activate(model, ["default", "b"])
    x = torch.randn(2, IN)
    layer = model[0]
    deltas = [layer.lora_delta("default"), layer.lora_delta("b")]
    wide = [F.linear(x.double(), layer.weight.double(), layer.bias.double())]
    exact = sum((x.double() @ delta.double().T for delta in deltas), *wide)
    assert_rounded_alike((model(x), layer.base(x) + x @ sum(deltas).T, exact))


def test_autocast_computes_in_sixteen_bits_and_trains_in_float32():
    one, x = layer(), torch.randn(4, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = one(x)
        base = one.base(x)
    assert y.dtype == base.dtype == torch.bfloat16
    assert_rounded_alike((y, plain(one, x.bfloat16()), expected(one, x)))
    y.float().sum().backward()
    assert one.lora_A.grad.dtype == torch.float32


def test_dropout_acts_on_the_low_rank_path_in_training_only():
    one = layer(dropout=0.5)
    x = torch.randn(50, IN)
    one.eval()
    assert torch.equal(one(x), one(x))
    assert_answers(one, x)
    one.train()
    assert not torch.equal(one(x), one(x))
    nn.init.zeros_(one.lora_B)
    assert torch.equal(one(x), one.base(x))


def test_dropout_keeps_the_expected_answer():
    one = layer(dropout=0.25).train()
    x = torch.randn(1, IN)
    mean = torch.stack([one(x) for _ in range(4000)]).mean(0)
    assert torch.allclose(mean.double(), expected(one, x), atol=0.25)


def functional_grad(one: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Differentiate through functional_call with respect to A."""
    parameters = {name: p.detach() for name, p in one.named_parameters()}

    def loss(a: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(one, parameters | {"lora_A": a}, (x,)).sum()

    return torch.func.grad(loss)(parameters["lora_A"])


def test_torch_func_sees_the_adapter():
    one, x = layer(), torch.randn(4, IN)
    assert_rounded_alike((torch.vmap(one)(x), plain(one, x), expected(one, x)))
    one(x).sum().backward()
    exact = functional_grad(copy.deepcopy(one).double(), x.double())
    assert_rounded_alike((functional_grad(one, x), one.lora_A.grad, exact))


def test_a_compiled_layer_answers_equally_and_switches():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, OUT))
    hf_lora.wrap(model, targets=".*", r=R)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(4, IN)
    assert_rounded_alike((compiled(x), model(x), exact(x.double())))
    with hf_lora.no_adapter(model), hf_lora.no_adapter(exact):
        assert_rounded_alike((compiled(x), model(x), exact(x.double())))
    assert_rounded_alike((compiled(x), model(x), exact(x.double())))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_of_a_layer_answers_equally(make: Callable[[nn.Module], nn.Module]):
    one, x = layer(), torch.randn(2, IN)
    twin = make(one)
    assert type(twin) is type(one)
    assert torch.equal(twin(x), one(x))
    assert twin.r == R


def test_forward_hooks_stay_and_see_the_whole_answer():
    model = nn.Sequential(nn.Linear(IN, OUT))
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    hf_lora.wrap(model, targets="0", r=R)
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(2, IN)
    y = model(x)
    assert seen[-1] is y
    hf_lora.unwrap(model)
    assert torch.equal(model(x), seen[-1])
    handle.remove()
    assert not model[0]._forward_hooks


def test_the_base_view_is_alone():
    one, x = layer(), torch.randn(2, IN)
    view = one.base
    assert type(view) is nn.Linear
    assert view.weight is one.weight
    assert torch.equal(view(x), F.linear(x, one.weight, one.bias))
    assert list(view.state_dict()) == ["weight", "bias"]
    calls = []
    view.register_forward_hook(lambda *args: calls.append(args))
    one(x)
    assert not calls  # a hook on the view is not one on the layer


def test_it_shows_what_it_has():
    one = layer()
    assert repr(one) == (
        f"LoRALinear(in_features={IN}, out_features={OUT}, bias=True, lora=(default: r=3, alpha=5))"
    )
    assert isinstance(one, nn.Linear)
    assert isinstance(one, hf_lora.LoRALinear)
    assert inspect.isclass(type(one))
