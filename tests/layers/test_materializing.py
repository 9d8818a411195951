"""Models that are wrapped before they have weights: on the meta device, to be loaded later."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import hf_lora
from hf_lora import StateError
from tests.model.models import TOKENS, llama
from tests.rounding import assert_rounded_alike
from tests.tiny import Net, adapted, answers, scramble

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill new memory with what is not a number, so that whoever reads it is found out."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def empty() -> Net:
    """A model without weights."""
    with torch.device("meta"):
        return Net()


def wrap(model: nn.Module, **fields: object) -> nn.Module:
    """Wrap from a fixed seed."""
    torch.manual_seed(4)
    return hf_lora.wrap(model, ["q_proj", "v_proj"], r=2, **fields)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer would hold."""
    return [p for p in model.parameters() if p.requires_grad]


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_adapters_have_their_values_before_the_base_has(init: str, poison: None):
    expected = factors(wrap(Net(), init=init))
    model = wrap(empty(), init=init)
    assert model.layers[0].q_proj.weight.is_meta
    for _ in range(2):
        assert factors(model).keys() == expected.keys()
        assert all(torch.equal(p, expected[n]) for n, p in factors(model).items())
        model.to_empty(device="cpu")
    assert model.layers[0].q_proj.weight.isnan().all()
    model.load_state_dict(Net().state_dict(), strict=False)
    scramble(model)
    plain = wrap(Net())
    scramble(plain)
    assert torch.equal(answers(model), answers(plain))
    model.train()(torch.ones(1, 8)).sum().backward()
    hf_lora.unwrap(model)
    assert torch.equal(answers(model), answers(Net()))


def test_parameters_stay_what_an_optimizer_holds(poison: None):
    model = wrap(empty())
    held = trained(model)
    model.to_empty(device="cpu")
    model.load_state_dict(Net().state_dict(), strict=False)
    assert all(a is b for a, b in zip(held, trained(model), strict=True))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_adapters_that_were_moved_to_meta_are_drawn_anew(init: str, poison: None):
    model = wrap(Net(), init=init)
    scramble(model)
    model.to("meta").to_empty(device="cpu")
    for name, tensor in factors(model).items():
        assert torch.isfinite(tensor).all(), name
        if "lora_B" in name:
            assert not tensor.any(), name
        else:
            bound = tensor.shape[1] ** -0.5
            inside = bool((tensor.abs() <= bound).all())
            assert inside is (init == "kaiming"), name
            assert tensor.std() > 0.1, name


def test_copies_that_were_moved_to_meta_are_not_a_number(poison: None):
    model = wrap(Net(), train=["head"])
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(Net().state_dict(), strict=False)
    assert answers(model).isnan().all()


def test_an_adapter_is_loaded_before_the_base(tmp_path: Path, poison: None):
    plain = adapted()
    hf_lora.save(plain, tmp_path)
    with pytest.raises(StateError, match=r"on the meta device.*check_base=False"):
        hf_lora.load(empty(), tmp_path)
    model = hf_lora.load(empty(), tmp_path, check_base=False)
    model.to_empty(device="cpu")
    model.load_state_dict(Net().state_dict(), strict=False)
    assert torch.equal(answers(model), answers(plain))
    hf_lora.save(model, tmp_path / "again")
    hf_lora.load(Net(), tmp_path / "again")
    with pytest.raises(hf_lora.BaseMismatchError):
        hf_lora.load(Net(seed=1), tmp_path / "again")


PLACES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
PLACES |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
@pytest.mark.parametrize("loads", [True, False], ids=["load", "wrap"])
@pytest.mark.parametrize("meta", [True, False], ids=["meta", "init_empty_weights"])
def test_weights_that_accelerate_loads_and_dispatches(
    tmp_path: Path, inside: bool, loads: bool, meta: bool
):
    plain = llama()
    plain.save_pretrained(tmp_path / "base")
    torch.manual_seed(4)
    hf_lora.wrap(plain, TARGETS, r=4)
    if loads:
        scramble(plain)
    hf_lora.save(plain, tmp_path / "adapter")

    def adapt() -> None:
        torch.manual_seed(4)
        if loads:
            hf_lora.load(model, tmp_path / "adapter", check_base=False, trainable=True)
        else:
            hf_lora.wrap(model, TARGETS, r=4)

    with torch.device("meta") if meta else init_empty_weights():
        model = llama()
        if inside:
            adapt()
    if not inside:
        adapt()
    if meta:
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)  # in no checkpoint
    load_checkpoint_and_dispatch(
        model, tmp_path / "base", device_map=PLACES, offload_folder=tmp_path / "offload"
    )
    assert model.lm_head.weight.is_meta
    assert all(torch.equal(p, factors(plain)[n]) for n, p in factors(model).items())
    exact = copy.deepcopy(plain).double()
    for each in (model, plain, exact):
        each.train()(TOKENS, labels=TOKENS).loss.backward()
        with torch.no_grad():
            for parameter in each.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        each.eval()
    with torch.no_grad():
        before, right = model(TOKENS).logits, exact(TOKENS).logits
        assert_rounded_alike((before, plain(TOKENS).logits, right))
        hf_lora.merge(model)
        hf_lora.merge(plain)
        assert_rounded_alike((model(TOKENS).logits, plain(TOKENS).logits, right))
        hf_lora.unmerge(model)
        assert torch.equal(model(TOKENS).logits, before)
