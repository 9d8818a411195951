"""When DDP is spared its search for parameters that a step did not use."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_lora
from hf_lora.integrations.trainer.ddp import reaches_all
from hf_lora.model.registry import wrapped
from tests.integrations import training

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 24}


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=24, **sizes))


def mixtral() -> Any:
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**SMALL, **sizes))


def bert() -> Any:
    return BertModel(BertConfig(**SMALL, num_attention_heads=2))


def wrapped_llama(**fields: Any) -> Any:
    return hf_lora.wrap(training.llama(), **({"targets": "q_proj", "r": 2} | fields))


def with_a_second(active: bool) -> Any:
    model = hf_lora.add_adapter(wrapped_llama(), "second", targets="v_proj", r=2)
    if active:
        hf_lora.activate(model, ["default", "second"])
    return model


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (lambda: wrapped_llama(), True),
        (lambda: wrapped_llama(train=["norm"]), True),
        (lambda: hf_lora.wrap(t5(), "q", r=2), True),
        (lambda: with_a_second(active=True), True),
        # what trains and is not used, or is not always used
        (lambda: with_a_second(active=False), False),
        (lambda: wrapped_llama(targets=["q_proj", "lm_head"]), False),
        (lambda: wrapped_llama(train=["lm_head"]), False),
        (lambda: hf_lora.wrap(mixtral(), "q_proj", r=2), False),
        # its pooler may be no part of the loss
        (lambda: hf_lora.wrap(bert(), "query", r=2), False),
    ],
)
def test_only_where_each_step_is_known_to_reach_everything(model: Any, known: bool):
    assert reaches_all(*wrapped(model())) is known


@pytest.mark.parametrize(("said", "found"), [(None, False), (True, True), (False, False)])
def test_what_the_user_says_counts(tmp_path: Path, said: bool | None, found: bool):
    made = training.trainer(training.wrapped(), tmp_path, ddp_find_unused_parameters=said)
    assert made.accelerator.ddp_handler.find_unused_parameters is found


def test_a_model_that_is_not_wrapped_keeps_trainers_way(tmp_path: Path):
    made = training.trainer(training.llama(), tmp_path)
    assert made.accelerator.ddp_handler.find_unused_parameters is True
