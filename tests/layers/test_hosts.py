"""Which classes of layer can be adapted, and why the others are refused, by name and untouched."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import hf_lora
from hf_lora import HfLoRAWarning, TargetError
from tests.layers.own_layers import IN, OUT, Own, Routed, Transposed
from tests.snapshot import snapshot
from tests.tiny import scramble


class Doubling(nn.Linear):
    """A subclass whose forward is not that of a linear layer with its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Silent(nn.Linear):
    """A subclass that computes what its parent does, and only adds something harmless."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(input)


class Detached(Own):
    """Its backward gives nothing to its input, as inference-only kernels' does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() @ self.weight.T


class Pair(Own):
    """Returns a tuple, as Megatron's layers do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.T, None


class Pooling(Own):
    """Makes one row of many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.T).sum(0)


class Stacked(Own):
    """A stack of matrices, as experts are, that calls itself a linear layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, OUT, IN))


class Foreign(Own):
    """Carries the adapter of another library."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Linear(IN, 2)


WORKS: list[tuple[str, Callable[[], nn.Module], bool]] = [
    ("Linear", lambda: nn.Linear(IN, OUT), True),
    ("no bias", lambda: nn.Linear(IN, OUT, bias=False), True),
    ("float64", lambda: nn.Linear(IN, OUT, dtype=torch.float64), True),
    ("Conv1D", lambda: Conv1D(OUT, IN), True),
    ("square Conv1D", lambda: Conv1D(IN, IN), True),
    ("own class", Own, True),
    ("subclass", lambda: Silent(IN, OUT), True),
    ("own forward", lambda: Doubling(IN, OUT), False),
    ("transposed", Transposed, False),
    ("transposed square", lambda: Transposed(IN), False),
    ("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(IN, OUT)), False),
    ("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(IN, OUT)), False),
    ("pruned", lambda: prune.random_unstructured(nn.Linear(IN, OUT), "weight", 0.5), False),
]


@pytest.mark.parametrize(("make", "merges"), [w[1:] for w in WORKS], ids=[w[0] for w in WORKS])
def test_a_host_that_works(make: Callable[[], nn.Module], merges: bool):
    """It starts as it was, adds s B A x, trains, merges or says why not, and comes back."""
    model = nn.Sequential(make())
    dtype = next(model.parameters()).dtype
    x = torch.randn(5, IN, dtype=dtype)
    y = model(x)
    before = snapshot(model)

    hf_lora.wrap(model, targets="0", r=2, alpha=6.0)
    layer = model[0]
    assert torch.equal(model(x), y)
    scramble(model)
    update = 3 * (x @ layer.lora_A.T.to(dtype)) @ layer.lora_B.T.to(dtype)
    adapted = model(x)
    assert torch.allclose(adapted, y + update, atol=1e-5)
    adapted.sum().backward()
    assert layer.lora_A.grad.any()
    assert layer.lora_B.grad.any()

    if merges:
        hf_lora.merge(model)
        assert torch.allclose(model(x), adapted, atol=1e-5)
        hf_lora.unmerge(model)
    else:
        with pytest.raises(TargetError, match="its base"):
            hf_lora.merge(model)
    assert torch.equal(model(x), adapted)
    hf_lora.unwrap(model)
    assert torch.equal(model(x), y)
    after = snapshot(model)
    if isinstance(model[0], Silent) or hasattr(model[0], "weight_mask"):
        # their own forward leaves something behind: a count, a weight computed anew
        before, after = (dataclasses.replace(each, attributes={}) for each in (before, after))
    assert after == before


def test_arguments_beside_the_input_reach_the_host():
    model = nn.ModuleList([Own()])
    x = torch.randn(5, IN)
    hf_lora.wrap(model, targets="0", r=2)
    scramble(model)
    plain = model[0](x)
    assert torch.allclose(model[0](x, 1.0, shift=1.5), plain + 1.5)
    assert torch.allclose(model[0](x=x, gain=1.0), plain)
    routed = nn.ModuleList([Routed()])
    hf_lora.wrap(routed, targets="0", r=2)
    scramble(routed)
    layer, route = routed[0], torch.tensor(0.5)
    update = layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x, route), layer.base(x, route) + update, atol=1e-4)
    with pytest.raises(TargetError, match="not x W"):
        hf_lora.merge(routed)


REFUSED: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("norm", lambda: nn.LayerNorm(IN), "LayerNorm is no linear layer"),
    ("bilinear", lambda: nn.Bilinear(IN, IN, OUT), "Bilinear is no linear layer"),
    ("lazy", lambda: nn.LazyLinear(OUT), "has no sizes yet"),
    ("empty", lambda: nn.Linear(IN, 0), "has no sizes yet"),
    ("no gradient", Detached, "gives no gradient to its input"),
    ("tuple", Pair, "returns a tuple, not a tensor"),
    ("other shape", Pooling, r"makes (10,) of one row, not (1, 10)"),
    ("stack of matrices", Stacked, "shape (4, 10, 6)"),
    ("other library", Foreign, "another library's adapter"),
    ("TorchScript", lambda: torch.jit.script(nn.Linear(IN, OUT)), "compiled by TorchScript"),
    ("small", lambda: nn.Linear(1, OUT), "r=2 is larger than the layer's smaller side, 1"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("make", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_a_host_that_is_refused_is_named_and_left_as_it_was(
    make: Callable[[], nn.Module], words: str
):
    model = nn.ModuleList([make(), nn.Linear(IN, OUT)])
    lazy = any(isinstance(m, nn.LazyLinear) for m in model)
    before = None if lazy else snapshot(model)
    with pytest.raises(TargetError) as caught:
        hf_lora.wrap(model, targets=["0", "1"], r=2)
    assert words in str(caught.value)
    assert type(model[1]) is nn.Linear
    if before is not None:
        assert snapshot(model) == before
    # and the others can still be had
    hf_lora.wrap(model, targets="1", r=2)
    hf_lora.unwrap(model)


def test_a_lazy_layer_can_be_adapted_once_it_has_sizes():
    model = nn.Sequential(nn.LazyLinear(OUT))
    assert "no sizes yet" in str(hf_lora.plan(model, targets="0", r=2))
    model(torch.randn(1, IN))
    hf_lora.wrap(model, targets="0", r=2)
    assert model[0].lora_A.shape == (2, IN)


def test_children_of_multihead_attention_are_refused_and_left_out():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match="MultiheadAttention reads its weight"):
        hf_lora.wrap(model, targets=["out_proj", "fc"], r=2)
    plan = hf_lora.plan(model, r=2)
    assert [target.path for target in plan.targets] == ["fc"]
    assert "without calling it" in plan.left_out["attn.out_proj"]


def test_the_fast_path_of_a_transformer_layer_reads_the_updates():
    """In eval mode it takes linear1's weight and never calls it: LoRA would be off in silence."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    plan = hf_lora.plan(model, r=2)
    assert [target.path for target in plan.targets] == ["linear1", "linear2"]
    hf_lora.wrap(model, r=2, targets=["linear1", "linear2"])
    scramble(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = model(x)
        with hf_lora.no_adapter(model):
            assert not torch.allclose(model(x), fast)
    torch.testing.assert_close(model(x), fast)
    # the decoder layer calls its own
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    hf_lora.wrap(decoder, targets=["linear1", "linear2"], r=2)
    scramble(decoder)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        adapted = decoder.eval()(x, x)
        with hf_lora.no_adapter(decoder):
            assert not torch.allclose(decoder(x, x), adapted)


class Reader(nn.Module):
    """Uses one layer's weight by itself, and asks another's for its type only."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(IN, IN) for _ in range(3))

    def _init_weights(self) -> None:
        nn.init.zeros_(self.v_proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.k_proj.weight.dtype) if isinstance(self.k_proj.weight, torch.Tensor) else x
        return F.linear(x, self.q_proj.weight) + self.k_proj(x) + self.v_proj(x)


def test_a_layer_whose_weight_the_model_reads_itself_is_told():
    model = nn.Sequential(Reader(), Reader())
    plan = hf_lora.plan(model, targets=".*_proj", r=2)
    assert len(plan.warnings) == 1
    assert "0.q_proj (2 in all): Reader's own code reads q_proj.weight" in plan.warnings[0]
    assert "warning: 0.q_proj" in str(plan)
    with pytest.warns(HfLoRAWarning, match="may not be seen") as caught:
        hf_lora.wrap(model, targets=".*_proj", r=2)
    assert caught[0].filename == __file__
    with pytest.warns(HfLoRAWarning, match="may not be seen") as caught:
        hf_lora.add_adapter(model, "b", "q_proj", r=2)
    assert caught[0].filename == __file__
    hf_lora.add_adapter(model, "c", "[kv]_proj", r=2)


def test_a_forward_on_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(IN, OUT))
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1
    before = snapshot(model)
    with pytest.raises(TargetError, match="replaced on the instance"):
        hf_lora.wrap(model, targets="0", r=2)
    assert snapshot(model) == before
