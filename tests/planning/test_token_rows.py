"""What ``train_rows`` means, what it costs, and what it cannot mean."""

from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.errors import ConfigError, TargetError
from tests.kinds.token_models import MODELS, ROWS, llama


def test_the_plan_says_what_is_wrapped():
    plan = hf_lora.plan(MODELS["t5"][0](), "q", train_rows={"shared": ROWS}, r=2)
    (rows,) = plan.rows
    assert (rows.path, rows.ids, rows.width, rows.parameters) == ("shared", ROWS, 16, 48)
    assert set(rows.tied_to) >= {"encoder.embed_tokens", "decoder.embed_tokens"}
    assert "3 rows of 16" in str(plan)
    assert "decoder.embed_tokens shares its weight with shared: the rows train in both" in str(plan)
    model = hf_lora.wrap(MODELS["t5"][0](), "q", train_rows={"shared": ROWS}, r=2)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters
    assert plan.gradient_bytes == 4 * plan.parameters
    shared = hf_lora.plan(MODELS["t5"][0](), (), train_rows={"shared": ROWS}, world=2)
    assert shared.per_rank[0].gradients == shared.gradient_bytes == 4 * 48
    (one,) = hf_lora.summary(model).adapters
    assert one.rows == dict.fromkeys(("shared", *rows.tied_to), 3)
    assert one.norms["shared"] == 0.0
    assert "rows: 3 of shared" in str(hf_lora.summary(model))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train_rows": {"embed": [1]}}, "matches no module; near: embed_tokens"),
        ({"train_rows": {"model": [1]}}, "is neither an embedding nor a linear layer"),
        ({"train_rows": {"embed_tokens": [39, 40]}}, r"has 40 rows.*'40'.*resize_token_embeddings"),
        (
            {"train_rows": {"embed_tokens": [1]}, "train": ["embed_tokens"]},
            "is trained in full",
        ),
        ({"train_rows": {"embed_tokens": [1]}, "train": ["lm_head"]}, "is trained in full"),
        (
            {"train_rows": {"embed_tokens": [1]}, "targets": ["lm_head"]},
            "rows of it are trained",
        ),
        (
            {"train_rows": {"embed_tokens": [1], "lm_head": [2]}},
            "share one weight, and are given different rows",
        ),
        (
            {"train_rows": {"embed_tokens": [1], "model.embed_tokens": [2]}},
            "is given different rows by 'embed_tokens' and 'model.embed_tokens'",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(fields: dict[str, Any], words: str):
    model, base = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    with pytest.raises(TargetError, match=f"(?s){words}"):
        hf_lora.wrap(model, **{"targets": (), **fields})
    assert list(model.state_dict()) == list(base.state_dict())
    assert not hasattr(model, "_hf_lora")


def test_a_module_has_rows_or_a_bias_that_trains():
    with pytest.raises(TargetError, match=r"the bias of cls\.predictions\.decoder is trained"):
        hf_lora.wrap(MODELS["bert"][0](), "query", bias="all", train_rows={"decoder": [1]})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Embedding(40, 16, max_norm=1.0), "renormalizes its rows in place"),
        (lambda: nn.Embedding(40, 16, sparse=True), "are sparse"),
    ],
)
def test_embeddings_of_other_kinds_are_refused_by_name(make: Any, words: str):
    model = llama()
    model.model.embed_tokens = make()
    with pytest.raises(TargetError, match=words):
        hf_lora.wrap(model, (), train_rows={"embed_tokens": [1]})


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([-1], "-1 is neither"),
        ([True], "True is neither"),
        ([1.5], "1.5 is neither"),
        ([], "no rows"),
        ([""], "'' is neither"),
    ],
)
def test_a_configuration_says_what_rows_are_wrong(rows: list[Any], words: str):
    with pytest.raises(ConfigError, match=words):
        hf_lora.LoRAConfig(train_rows={"embed_tokens": rows})


def test_equal_meanings_are_equal():
    a = hf_lora.LoRAConfig(train_rows={"embed_tokens": range(3)})
    b = hf_lora.LoRAConfig(train_rows={"embed_tokens": torch.tensor([2, 1, 0, 0])})
    assert a == b
    assert hash(a) == hash(b)
    assert hf_lora.LoRAConfig.from_dict(a.to_dict()) == a
    with pytest.raises(ConfigError, match="targets: empty"):
        hf_lora.LoRAConfig(targets=())
