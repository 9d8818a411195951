"""What a vLLM engine gets of a wrapped policy: the base's names, merged, one tensor at a time.

Through TRL's own functions; in the place of the engine stands something that keeps what it is sent.
"""

import gc
import importlib
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

import hf_lora
from hf_lora.errors import HfLoRAWarning, StateError, TargetError
from hf_lora.integrations import vllm_weights
from hf_lora.integrations.in_front import is_in_front
from tests.integrations import training
from tests.snapshot import snapshot

X = torch.tensor([[3, 5, 7, 9]])
Tensors = dict[str, torch.Tensor]


class Engine:
    """Keeps copies of what it is sent, and notes how many of the tensors are there at a time."""

    def __init__(self, model: Any):
        self.own = {parameter.data_ptr() for parameter in model.parameters()}
        self.kept: Tensors = {}
        self.sent: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []
        self.resets = 0

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        ((name, tensor),) = weights
        assert name not in self.kept
        self.kept[name] = tensor.clone()
        if tensor.data_ptr() not in self.own:
            self.sent.append(weakref.ref(tensor))
        self.alive.append(sum(each() is not None for each in self.sent))

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def update_named_params(self, metadata: list[Any], params: Any) -> None:
        for (name, dtype, shape), (sent, tensor) in zip(metadata, params, strict=True):
            assert (name, dtype, shape) == (sent, str(tensor.dtype)[6:], list(tensor.shape))
            self.load_weights([(sent, tensor)])

    @property
    def llm(self) -> Any:
        """Where TRL finds the model of an engine in its own process."""
        found: Any = types.SimpleNamespace(model=self)
        for name in ("model_runner", "driver_worker", "model_executor", "llm_engine"):
            found = types.SimpleNamespace(**{name: found})
        found.reset_prefix_cache = self.reset_prefix_cache
        return found


def sync(model: Any, mode: str = "colocate") -> Engine:
    """Let TRL bring an engine up to date."""
    engine = Engine(model)
    generation = object.__new__(VLLMGeneration)  # its constructor starts the real one
    accelerator = Accelerator(cpu=True)
    vars(generation).update(
        model=model,
        mode=mode,
        accelerator=accelerator,
        enable_sleep_mode=False,
        llm=engine.llm,
        vllm_client=engine,
        _dist=DistributedBackend(accelerator),
        _weight_metadata=None,
    )
    gc.collect()
    generation.sync_weights()
    assert engine.resets == 1
    return engine


@torch.no_grad()
def loud(model: Any, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def merged(model: Any) -> Tensors:
    """The oracle: the parameters of a model into which the adapters were merged for good."""
    whole = hf_lora.merge_and_unwrap(model)
    return {name: parameter.detach() for name, parameter in whole.named_parameters()}


def equal(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_an_engine_gets_what_a_merge_would_leave(mode: str):
    model = loud(training.wrapped(train=["norm", "lm_head"]))
    before = snapshot(model)
    engine = sync(model, mode)
    assert snapshot(model) == before
    assert max(engine.alive) == 1
    assert equal(engine.kept, merged(model))


def test_in_bfloat16_each_weight_is_rounded_once():
    model = training.llama().to(torch.bfloat16)
    model = loud(hf_lora.wrap(model, "all-linear", r=4))
    engine = sync(model)
    assert {tensor.dtype for tensor in engine.kept.values()} == {torch.bfloat16}
    assert equal(engine.kept, merged(model))


def test_of_several_adapters_those_in_use():
    model = loud(training.wrapped())
    loud(hf_lora.add_adapter(model, "fr", targets=["o_proj", "q_proj"], r=2), seed=4)
    with hf_lora.no_adapter(model):
        base = sync(model).kept
    plain = {name: parameter.detach() for name, parameter in training.llama().named_parameters()}
    assert equal(base, plain)
    hf_lora.activate(model, {"default": 0.7, "fr": 0.3})
    assert equal(sync(model).kept, merged(model))


def test_a_model_that_is_merged_already():
    model = loud(training.wrapped())
    apart = sync(model).kept
    assert equal(sync(hf_lora.merge(model)).kept, apart)


def test_a_model_of_which_a_part_is_wrapped():
    model = training.llama().requires_grad_(False)
    loud(hf_lora.wrap(model.model, "q_proj", r=4))
    kept = sync(model).kept
    hf_lora.merge_and_unwrap(model.model)
    assert equal(kept, {name: parameter.detach() for name, parameter in model.named_parameters()})


def test_a_layer_that_keeps_its_weight_the_other_way_round():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = loud(hf_lora.wrap(GPT2LMHeadModel(config), ["c_attn", "c_fc"], r=2))
    assert equal(sync(model).kept, merged(model))


def test_tied_weights_come_once():
    model = loud(training.wrapped(fields={"tie_word_embeddings": True}))
    assert "lm_head.weight" not in sync(model).kept


@pytest.mark.parametrize("fields", [{"targets": ["q_proj", "lm_head"]}, {"targets": ["lm_head"]}])
def test_a_tie_that_an_adapter_loosens_is_refused_before_the_first_tensor(fields: dict):
    """vLLM has one tensor for both, and would use the embeddings as the head."""
    model = loud(training.wrapped(fields={"tie_word_embeddings": True}, **fields))
    with pytest.raises(
        TargetError, match=r"lm_head\.weight is tied to that of model\.embed_tokens"
    ):
        sync(model)


def test_a_quantized_base_comes_as_the_numbers_that_it_stands_for(tmp_path: Path):
    training.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    loud(hf_lora.wrap(model, ["q_proj", "down_proj"], r=4))
    kept = sync(model).kept
    plain = training.llama(hidden_size=64, intermediate_size=128).eval()
    plain.load_state_dict(kept)
    with torch.no_grad():
        torch.testing.assert_close(plain(X).logits, model(X).logits, rtol=1e-3, atol=1e-4)


def test_a_plain_model_is_sent_as_ever():
    training.wrapped()
    model = training.llama()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert equal(sync(model).kept, parameters)


def test_fsdp1_is_refused_by_name():
    generation = types.SimpleNamespace(
        model=training.wrapped(), _dist=types.SimpleNamespace(fsdp_version=1)
    )
    with pytest.raises(StateError, match="use FSDP2"):
        vllm_weights._iterate(lambda: iter(()), generation)


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestOnlineDPO:
    """It has a way of its own to send weights."""

    def trainer(self, model: Any, mode: str) -> tuple[Any, Engine]:
        module = importlib.import_module("trl.experimental.online_dpo.online_dpo_trainer")
        engine = Engine(model)
        trainer = object.__new__(module.OnlineDPOTrainer)
        accelerator = Accelerator(cpu=True)
        client = types.SimpleNamespace(
            update_named_param=lambda name, tensor: engine.load_weights([(name, tensor)])
        )
        vars(trainer).update(
            model=model,
            vllm_mode=mode,
            accelerator=accelerator,
            llm=engine.llm,
            vllm_client=client,
            is_fsdp_enabled=False,
            is_deepspeed_enabled=False,
        )
        return trainer, engine

    @pytest.mark.parametrize("mode", ["colocate", "server"])
    def test_it_sends_the_same(self, mode: str):
        model = loud(training.wrapped())
        trainer, engine = self.trainer(model, mode)
        trainer._move_model_to_vllm_inner()
        assert max(engine.alive) == 1
        assert equal(engine.kept, merged(model))

    def test_sharded_it_is_refused(self):
        trainer, _ = self.trainer(training.wrapped(), "colocate")
        trainer.is_fsdp_enabled = True
        with pytest.raises(StateError, match="cannot send a wrapped model that FSDP"):
            trainer._move_model_to_vllm_inner()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", vllm_weights._SENDERS)
def test_what_hf_lora_hooks_into_is_there(name: str):
    training.wrapped()
    cls, method = vllm_weights._SENDERS[name]
    owner = getattr(importlib.import_module(name), cls)
    assert is_in_front(vars(owner)[method]), f"{name}.{cls}.{method}"


def test_a_version_without_it_is_warned_of():
    module = types.ModuleType("trl.generation.vllm_generation")
    with pytest.warns(HfLoRAWarning, match="VLLMGeneration of this version has no _iter_named"):
        vllm_weights._patch(module)
