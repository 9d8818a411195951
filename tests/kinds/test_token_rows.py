"""Rows of embeddings and heads: the plain twin's outputs and gradients, and nothing else trains."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_lora
from hf_lora.errors import StateError, TargetError
from hf_lora.merging.hand_over import merged_tensors
from tests.kinds.token_models import (
    IDS,
    MODELS,
    ROWS,
    VOCABULARY,
    answers,
    inputs,
    llama,
    logits,
    loud,
    rows_of,
    twin,
    wrapped,
)
from tests.rounding import assert_rounded_alike

EACH = pytest.mark.parametrize("name", MODELS)
TIED = [name for name in MODELS if name not in ("llama", "head")]


def stepped(model: Any, *parameters: nn.Parameter) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a loss that all logits are part of."""
    out = logits(model)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum(), parameters)


@EACH
def test_it_begins_as_the_base_and_trains_the_rows_alone(name: str):
    make, path = MODELS[name]
    model, base = hf_lora.wrap(make(), (), train_rows={path: ROWS}), make()
    torch.testing.assert_close(answers(model), answers(base), rtol=1e-5, atol=1e-6)
    others = [column for column in range(VOCABULARY) if column not in ROWS]
    assert torch.equal(answers(model)[..., others], answers(base)[..., others])
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [p.shape for p in trains.values()] == [(len(ROWS), 16)]
    before = base.state_dict()
    assert [key for key in model.state_dict() if key in before] == list(before)
    assert {key.rpartition(".")[2] for key in model.state_dict().keys() - before.keys()} == {
        "lora_rows"
    }


@EACH
def test_outputs_and_gradients_are_the_plain_twins(name: str):
    model, (plain, weight) = wrapped(name), twin(name)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    model, plain = model.double(), plain.double()
    weight = next(p for p in plain.parameters() if p.shape == weight.shape)
    if name == "head":
        weight = plain.lm_head.weight
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-10, atol=1e-10)
    (ours,) = stepped(model, rows_of(model))
    (theirs,) = stepped(plain, weight)
    torch.testing.assert_close(ours, theirs[list(ROWS)], rtol=1e-9, atol=1e-9)


@EACH
def test_leaving_is_leaving_no_trace(name: str):
    base = MODELS[name][0]()
    types = {path: type(module) for path, module in base.named_modules()}
    model = wrapped(name)
    with hf_lora.no_adapter(model):
        assert torch.equal(answers(model), answers(base))
    hf_lora.unwrap(model)
    assert {path: type(module) for path, module in model.named_modules()} == types
    assert list(model.state_dict()) == list(base.state_dict())
    assert not [n for m in model.modules() for n in vars(m) if n.startswith("lora_")]
    assert torch.equal(answers(model), answers(base))


@EACH
def test_merging_keeps_ties_is_exact_and_undone(name: str):
    model, (plain, weight) = wrapped(name), twin(name)
    want = answers(model)
    before = dict(model.named_parameters(remove_duplicate=False))
    hf_lora.merge(model)
    assert torch.equal(answers(model), answers(plain))
    torch.testing.assert_close(want, answers(plain), rtol=1e-5, atol=1e-6)
    handed = dict(hf_lora.merge_and_unwrap(copy.deepcopy(model)).state_dict())
    assert all(torch.equal(handed[key], value) for key, value in plain.state_dict().items())
    shared = {id(p) for n, p in model.named_parameters() if p.shape == weight.shape}
    assert len(shared) == (1 if name in TIED else 2)
    hf_lora.unmerge(model)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert now.keys() == before.keys()
    assert all(now[key] is parameter for key, parameter in before.items())
    assert torch.equal(answers(model), want)


class Sizes(TorchDispatchMode):
    """Notes how large the largest storage is that is made beside those of some tensors."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                new = storage.data_ptr() not in self.known
                self.largest = max(self.largest, storage.nbytes() if new else 0)
        return result


@pytest.mark.parametrize("name", ["llama", "head", "tied"])
def test_nothing_of_the_size_of_the_weight_is_made(name: str):
    make, path = MODELS[name]
    model = make()
    model.resize_token_embeddings(4096)
    hf_lora.wrap(model, (), train_rows={path: ROWS})
    weight = model.model.embed_tokens.weight
    with Sizes(*model.parameters()) as sizes:
        logits(model)[:, :, :50].sum().backward()
    assert weight.grad is None
    assert sizes.largest < weight.untyped_storage().nbytes()


def test_a_step_of_an_optimizer_moves_the_rows_and_no_others():
    model, base = hf_lora.wrap(llama(), (), train_rows={"embed_tokens": ROWS}), llama()
    groups = hf_lora.optimizer_groups(model, lr=0.1, weight_decay=0.5)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [("rows", 0.5, 1)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    assert rows_of(model).grad[:2].abs().sum(1).all()
    assert not rows_of(model).grad[2].any()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_base_of_16_bits_gets_rows_of_32_and_computes_in_its_own(name: str):
    make, path = MODELS[name]
    model = loud(hf_lora.wrap(make().bfloat16(), (), train_rows={path: ROWS}))
    plain, _ = twin(name)
    assert rows_of(model).dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    rounded = copy.deepcopy(plain).bfloat16()
    assert_rounded_alike((logits(model), logits(rounded), logits(rounded.double())))
    # many tokens of one kind: their gradients are added up in float32
    many = torch.full((1, 300), ROWS[0])
    model(many).logits.float().sum().backward()
    assert rows_of(model).grad.dtype == torch.float32


def test_several_adapters_have_rows_of_their_own():
    model = wrapped("tied", rows=[3, 9])
    hf_lora.add_adapter(model, "b", (), train_rows={"lm_head": [5, 11]})
    with torch.no_grad():
        rows_of(model, "_b").normal_()
    plain, weight = twin("tied", rows=[3, 9])
    assert torch.equal(hf_lora.activate(model, "default")(IDS).logits, logits(model))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    hf_lora.activate(model, ["default", "b"])
    with torch.no_grad():
        weight[[5, 11]] = rows_of(model, "_b")
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    hf_lora.activate(model, {"default": 0.25, "b": 2.0})
    base = llama(tie_word_embeddings=True).lm_head.weight
    with torch.no_grad():
        for ids, rows, factor in (
            ([3, 9], rows_of(model), 0.25),
            ([5, 11], rows_of(model, "_b"), 2.0),
        ):
            weight[ids] = base[ids] + factor * (rows - base[ids])
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    hf_lora.merge(model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    hf_lora.unmerge(model)
    hf_lora.delete_adapter(model, "b")
    assert not [key for key in model.state_dict() if key.endswith("_b")]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_rows_of_two_adapters_are_mixed_as_a_mean_alone(name: str):
    model = wrapped(name)
    hf_lora.add_adapter(model, "b", (), train_rows={MODELS[name][1]: [9, 20]})
    with torch.no_grad():
        rows_of(model, "_b").normal_()
    with pytest.raises(StateError, match="row 9, 1 in all"):
        hf_lora.activate(model, ["default", "b"])
    hf_lora.activate(model, {"default": 0.5, "b": 0.5})
    plain = MODELS[name][0]()
    with torch.no_grad():
        weight = plain.model.embed_tokens.weight
        old, a, b = weight.clone(), rows_of(model), rows_of(model, "_b")
        weight[[3, 11]] = (old[[3, 11]] + a[[0, 2]]) / 2
        weight[9] = (a[1] + b[0]) / 2
        weight[20] = (old[20] + b[1]) / 2
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    hf_lora.merge(model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_the_summary_has_the_distance_from_the_base_also_while_it_is_merged():
    model, base = wrapped("tied"), llama(tie_word_embeddings=True)
    want = (rows_of(model) - base.lm_head.weight[list(ROWS)]).norm().item()
    assert hf_lora.summary(model).adapters[0].norms["model.embed_tokens"] == pytest.approx(want)
    hf_lora.merge(model)
    assert hf_lora.summary(model).adapters[0].norms["model.embed_tokens"] == pytest.approx(want)


def test_the_padding_row_is_trained_by_the_head_alone():
    for name in ("llama", "tied"):
        base = MODELS[name][0]()
        base.model.embed_tokens.padding_idx = 3
        plain = copy.deepcopy(base)
        model = hf_lora.wrap(base, (), train_rows={"embed_tokens": ROWS})
        (ours,) = stepped(model, rows_of(model))
        (theirs,) = stepped(plain, plain.model.embed_tokens.weight)
        torch.testing.assert_close(ours, theirs[list(ROWS)], rtol=1e-4, atol=1e-5)
        assert bool(ours[0].any()) == (name == "tied")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool):
    model = wrapped("tied").train()
    (want,) = stepped(model, rows_of(model))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    out = logits(model)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out * weight).sum().backward()
    assert torch.equal(rows_of(model).grad, want)


@pytest.mark.parametrize("name", ["tied", "gemma", "head"])
def test_one_graph_computes_the_same(name: str):
    torch._dynamo.reset()
    model = wrapped(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)
    (ours,), (want,) = (stepped(each, rows_of(model)) for each in (compiled, model))
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_transforms_see_through_it():
    layer = wrapped("head").lm_head
    x = torch.randn(3, 16)
    rows = {"lora_rows": layer.lora_rows.detach()}

    def out(rows: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, rows, (x,)).sum()

    each = torch.func.vmap(torch.func.grad(out), in_dims=(None, 0))(rows, x)["lora_rows"]
    torch.testing.assert_close(each, x.unsqueeze(1).expand(3, 3, 16))


def test_copies_pickles_and_casts_keep_the_rows(tmp_path: Path):
    model = wrapped("tied")
    want = answers(model)
    assert torch.equal(answers(copy.deepcopy(model)), want)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(answers(again), want)
    assert again.lm_head.lora_rows is again.model.embed_tokens.lora_rows
    model.model.embed_tokens.to(torch.bfloat16)
    assert rows_of(model).dtype == torch.float32
    model.tie_weights()
    assert model.lm_head.lora_rows is model.model.embed_tokens.lora_rows


def test_an_engine_gets_the_rows_in_their_place():
    for name in ("tied", "llama"):
        model, (plain, _) = wrapped(name), twin(name)
        found = dict(merged_tensors(model))
        want = dict(plain.named_parameters())
        assert found.keys() == want.keys()
        assert all(torch.equal(found[key], value) for key, value in want.items())


def test_beside_layers_that_are_adapted_and_modules_that_are_trained():
    model = hf_lora.wrap(
        llama(), ["q_proj", "embed_tokens"], r=2, train=["norm"], train_rows={"lm_head": ROWS}
    )
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names >= {"lora_A", "lora_embedding_A", "lora_copy_weight", "lora_rows"}
    model(IDS, labels=IDS).loss.backward()
    assert rows_of(model).grad.any()


def test_other_adapters_keep_away_from_rows_and_rows_from_them():
    model = wrapped("tied")
    for fields in ({"targets": ["embed_tokens"]}, {"targets": ["q_proj"], "train": ["lm_head"]}):
        with pytest.raises(TargetError, match=r"rows of .* are trained by another adapter"):
            hf_lora.add_adapter(model, "b", **fields)
    other = hf_lora.wrap(llama(), ["embed_tokens"], r=2, train=["lm_head"])
    with pytest.raises(TargetError, match="has a low-rank update from another adapter"):
        hf_lora.add_adapter(other, "b", (), train_rows={"embed_tokens": ROWS})
    with pytest.raises(TargetError, match="is trained in full by another adapter"):
        hf_lora.add_adapter(other, "b", (), train_rows={"lm_head": ROWS})


def test_a_head_that_is_read_past_its_forward_is_told():
    class Past(type(llama())):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids).last_hidden_state @ self.lm_head.weight.t()

    torch.manual_seed(0)
    model = Past(llama().config)
    with pytest.warns(hf_lora.HfLoRAWarning, match="lm_head"):
        hf_lora.wrap(model, (), train_rows={"lm_head": ROWS})
    with pytest.warns(hf_lora.HfLoRAWarning, match="lm_head had no part"):
        model(IDS)


def test_a_wrapped_model_is_not_resized_and_a_resized_one_is_wrapped():
    model = llama(tie_word_embeddings=True)
    model.resize_token_embeddings(VOCABULARY + 2)
    new = [VOCABULARY, VOCABULARY + 1]
    plan = hf_lora.plan(model, (), train_rows={"embed_tokens": new})
    assert not plan.fresh
    hf_lora.wrap(model, (), train_rows={"embed_tokens": new})
    assert rows_of(model).shape == (2, 16)
    assert torch.equal(rows_of(model), model.lm_head.weight[new])
    with pytest.raises(StateError, match="Resize first, then wrap"):
        model.resize_token_embeddings(VOCABULARY + 3)
    assert rows_of(model).requires_grad
    assert inputs(model)
