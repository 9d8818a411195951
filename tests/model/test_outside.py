"""What other libraries do to adapted layers: in force as before, or an error; never silence."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_model_to_fp8_ao
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_lora
from hf_lora import HfLoRAWarning, StateError
from tests.integrations import training
from tests.model.models import TOKENS, llama
from tests.tiny import scramble


def adapted(targets: Any = "all-linear", **fields: Any) -> Any:
    wide = {"hidden_size": 64, "intermediate_size": 64}
    model = hf_lora.wrap(llama(**wide, **fields), targets, r=4)
    scramble(model)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits.float()


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    assert found
    return found


def quantize_aware(model: nn.Module) -> None:
    quantize_(model, QATConfig(Int8DynamicActivationIntxWeightConfig(), step="prepare"))


class TestConversions:
    @pytest.mark.parametrize(
        ("convert", "dtype"),
        [(convert_model_to_fp8_ao, torch.bfloat16), (quantize_aware, torch.float32)],
    )
    def test_one_that_would_throw_adapters_away_is_refused(self, convert: Any, dtype: torch.dtype):
        model = adapted(dtype=dtype)
        before, expected = factors(model), logits(model)
        with pytest.raises(StateError, match="carries an adapter, which would be gone with it"):
            convert(model)
        assert factors(model).keys() == before.keys()
        assert torch.equal(logits(model), expected)

    def test_dequantize_is_refused_and_says_the_way(self, tmp_path: Path):
        llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=four_bit, device_map="cpu"
        ).eval()
        hf_lora.wrap(model, r=4)
        scramble(model)
        expected = logits(model)
        with pytest.raises(StateError, match="dequantize"):
            model.dequantize()
        assert torch.equal(logits(model), expected)
        hf_lora.save(model, tmp_path / "adapter")
        hf_lora.unwrap(model)
        model.dequantize()
        hf_lora.load(model, tmp_path / "adapter")
        assert type(model.model.layers[0].self_attn.q_proj).__name__ == "LoRALinear"
        torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.05)


def replaced(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = nn.Linear(64, 64, bias=False)


def replaced_in_the_store(model: Any) -> None:
    model.model.layers[1].mlp._modules["up_proj"] = nn.Linear(64, 64, bias=False)


def a_block_replaced(model: Any) -> None:
    model.model.layers[0] = llama(hidden_size=64, intermediate_size=64).model.layers[0]


def deleted(model: Any) -> None:
    del model.model.layers[0].mlp.gate_proj


def hidden(model: Any) -> None:
    layer = model.model.layers[0].mlp.gate_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)


def fused(model: Any) -> None:
    """Put the product of two layers into one beside them."""
    mlp = model.model.layers[0].mlp
    mlp.gate_up = nn.Linear(64, 128, bias=False)
    mlp.gate_up.weight = nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)

    mlp.forward = types.MethodType(forward, mlp)


CHANGES = [replaced, replaced_in_the_store, a_block_replaced, deleted, hidden, fused]


class TestTheNextForward:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("first", [True, False], ids=["after a forward", "before any"])
    def test_it_says_what_is_in_force_no_longer(self, change: Callable, first: bool):
        model = adapted()
        if first:
            logits(model)
        change(model)
        for _ in range(2):
            with pytest.raises(StateError, match=r"model\.layers\.\d\.(self_attn|mlp)\.\w+_proj"):
                logits(model)

    @pytest.mark.parametrize("change", [c for c in CHANGES if c is not fused])
    def test_a_step_and_a_save_say_it_too(self, change: Callable, tmp_path: Path):
        model = training.wrapped()

        class Backbone(Trainer):
            """A loss that never calls the model itself."""

            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                if self.state.global_step == 1:
                    model.model.layers[0].self_attn._modules["q_proj"] = nn.Linear(32, 32)
                return model.model(inputs["input_ids"]).last_hidden_state.square().mean()

        with pytest.raises(StateError, match="q_proj is no longer part of the model"):
            training.trainer(model, tmp_path, cls=Backbone, max_steps=3).train()
        model = adapted()
        change(model)
        with pytest.raises(StateError, match="are not what they were"):
            hf_lora.save(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_projections_that_diffusers_fuses(self):
        model = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
            pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16,
        )  # fmt: skip
        hf_lora.wrap(model, ["to_q", "to_k", "to_v"], r=2)
        inputs = {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "encoder_hidden_states": torch.randn(1, 3, 16),
            "pooled_projections": torch.randn(1, 16),
            "timestep": torch.ones(1),
        }
        with torch.no_grad():
            expected = model(**inputs).sample
            model.fuse_qkv_projections()
            for _ in range(2):
                with pytest.raises(StateError, match=r"(?s)to_q \(beside it: to_qkv\).*to_v"):
                    model(**inputs)
            model.unfuse_qkv_projections()
            assert torch.equal(model(**inputs).sample, expected)

    def test_what_only_goes_around_layers_or_beside_them_is_no_fault(self, tmp_path: Path):
        model = adapted()
        expected = logits(model)
        model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
        model.model.layers[1].mlp.up_proj = checkpoint_wrapper(model.model.layers[1].mlp.up_proj)
        model.v_head = nn.Linear(64, 1).requires_grad_(False)
        model.model.layers[1].mlp.probe = nn.Linear(64, 1).requires_grad_(False)
        for _ in range(2):
            assert torch.equal(logits(model), expected)
        hf_lora.save(model, tmp_path)
        plain = llama(hidden_size=64, intermediate_size=64)
        again = hf_lora.load(plain, tmp_path, check_base=False)  # which has not what was added
        assert torch.equal(logits(again), expected)

    def test_it_can_be_unwrapped_after_that(self):
        model = adapted()
        replaced(model)
        with pytest.raises(StateError):
            logits(model)
        assert not any("lora" in key for key in hf_lora.unwrap(model).state_dict())
        assert logits(model).isfinite().all()


class TestCasts:
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
    def test_a_layer_or_a_block_that_is_cast_leaves_its_adapter_alone(self, dtype: torch.dtype):
        model = adapted()
        before = factors(model)
        model.model.layers[0].self_attn.q_proj.to(dtype)
        model.model.layers[1].to(dtype)
        assert model.model.layers[0].self_attn.q_proj.weight.dtype is dtype
        assert model.model.layers[1].mlp.up_proj.weight.dtype is dtype
        after = factors(model)
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_gradients_keep_their_type_too(self):
        model = adapted()
        model(TOKENS).logits.sum().backward()
        layer = model.model.layers[0].self_attn.q_proj.half()
        assert layer.lora_A.grad.dtype is torch.float32
        assert layer.half().float().weight.dtype is torch.float32

    def test_the_whole_model_in_8_bits_leaves_them_alone_as_well(self):
        model = adapted()
        before = factors(model)
        model.to(torch.float8_e4m3fn)
        assert model.lm_head.weight.dtype is torch.float8_e4m3fn
        assert all(torch.equal(t, before[n]) for n, t in factors(model).items())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_the_whole_model_takes_them_along(self, dtype: torch.dtype):
        model = adapted()
        assert {t.dtype for t in factors(model.to(dtype)).values()} == {dtype}
        around = nn.Sequential(adapted())
        assert {t.dtype for t in factors(around.to(dtype)).values()} == {dtype}
        alone = hf_lora.wrap(nn.Linear(4, 4), ".*", r=2).to(dtype)
        assert alone.lora_A.dtype is dtype
        built = nn.Sequential(hf_lora.LoRALinear(nn.Linear(4, 4), r=2)).to(dtype)
        assert built[0].lora_A.dtype is dtype

    def test_layers_that_rest_in_8_bits_answer_and_train_with_the_adapter(self):
        model = adapted()
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.to(torch.float8_e4m3fn)
        rested = {n: p.float() for n, p in model.named_parameters() if "lora_" not in n}
        twin = adapted()
        twin.load_state_dict(rested, strict=False)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(lambda m, args: m.to(torch.float32) and None)
                layer.register_forward_hook(lambda m, a, y: m.to(torch.float8_e4m3fn) and None)
        torch.testing.assert_close(logits(model), logits(twin))


def past_the_layer(model: Any) -> None:
    """Have the model's forward read the head's weight, as fused losses do."""

    def forward(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        states = self.model(input_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=states @ self.lm_head.weight.T)

    model.forward = types.MethodType(forward, model)


class TestTheHead:
    WORDS = "lm_head had no part in what was computed just now"

    @pytest.mark.parametrize("trains", [True, False])
    def test_a_forward_that_reads_its_weight_is_told_once(self, trains: bool):
        model = adapted(["q_proj", "lm_head"])
        if not trains:
            hf_lora.freeze(model, "default")
        logits(model)
        past_the_layer(model)
        with pytest.warns(HfLoRAWarning, match=self.WORDS):
            model(TOKENS)
        model(TOKENS)
        with hf_lora.no_adapter(model):
            model(TOKENS)

    def test_who_needs_not_be_told(self):
        for model in (adapted("q_proj"), hf_lora.merge(adapted(["lm_head"])), adapted(["lm_head"])):
            if "lm_head" not in hf_lora.adapters(model)["default"].targets:
                past_the_layer(model)
            model(TOKENS)
            model.generate(TOKENS, max_new_tokens=2, pad_token_id=0)

    def test_a_loss_that_calls_the_backbone_alone(self, tmp_path: Path):
        class Fused(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                model.generate(inputs["input_ids"][:1], max_new_tokens=1, pad_token_id=0)
                states = model.model(inputs["input_ids"]).last_hidden_state
                return (states @ model.lm_head.weight.T).square().mean()

        model = training.wrapped(targets=["lm_head"])
        hf_lora.freeze(model, "default")
        hf_lora.add_adapter(model, "new", ["q_proj"], r=2)
        hf_lora.activate(model, ["default", "new"])
        with pytest.warns(HfLoRAWarning, match=self.WORDS):
            training.trainer(model, tmp_path, cls=Fused, max_steps=1).train()
