"""What the reserved words mean, on real models of every shape, and what is told."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import HfLoRAWarning, LoRAConfig, TargetError
from tests.tiny import scramble

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.arange(3, 15).view(2, 6)
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def moe(**fields: Any) -> Any:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    routed = {"num_experts": 4, "num_experts_per_tok": 2}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**TEXT, **sizes, **routed, **fields))


def switch() -> Any:
    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    layers = {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    layers |= {"num_decoder_layers": 2, "num_experts": 3, "decoder_start_token_id": 0}
    config = hf.SwitchTransformersConfig(**sizes, **layers)
    return hf.SwitchTransformersForConditionalGeneration(config)


def mllama() -> Any:
    """Blocks whose class speaks of attention, and that hold both."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = hf.models.mllama.configuration_mllama.MllamaTextConfig(
        **TEXT, cross_attention_layers=[1], rope_parameters=rope
    )
    return hf.MllamaForCausalLM(config)


def perceiver() -> Any:
    """A feed-forward network beside attention, in no numbered block."""
    config = hf.PerceiverConfig(
        num_latents=4, d_latents=16, d_model=16, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=2, num_cross_attention_heads=2,
    )  # fmt: skip
    return hf.PerceiverModel(config)


def timesformer() -> Any:
    sizes = {key: SIZES[key] for key in SIZES if key != "vocab_size"}
    config = hf.TimesformerConfig(**sizes, image_size=8, patch_size=4, num_frames=2)
    return hf.TimesformerModel(config)


def last(paths: Any) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def chosen(model: nn.Module, *words: str, **fields: Any) -> set[str]:
    """Return the paths that words choose."""
    plan = hf_lora.plan(model, list(words), **{"r": 2, **fields})
    assert not plan.problems
    return {target.path for target in plan.targets}


MEANINGS: list[tuple[Callable[[], Any], set[str], set[str]]] = [
    (llama, LLAMA, GATED),
    (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=4)),
        {"attn.c_attn", "attn.c_proj"},
        {"mlp.c_fc", "mlp.c_proj"},
    ),
    (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
        {"self.query", "self.key", "self.value", "attention.output.dense"},
        {"intermediate.dense", r"\d.output.dense"},
    ),
    (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        {"Attention.q", "Attention.k", "Attention.v", "Attention.o"},
        {"DenseReluDense.wi", "DenseReluDense.wo"},
    ),
    (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(vocab_size=48, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
                         num_attention_heads=4, word_embed_proj_dim=32)
        ),
        {"q_proj", "k_proj", "v_proj", "out_proj"},
        {"fc1", "fc2"},
    ),
    (mllama, LLAMA, GATED),
    (
        perceiver,
        {"query", "key", "value", "attention.output.dense"},
        {"mlp.dense1", "mlp.dense2"},
    ),
    (
        timesformer,
        {"qkv", "(temporal_)?attention.output.dense"},
        {"intermediate.dense", r"\d.output.dense"},
    ),
    (moe, LLAMA, {rf"shared_expert.{name}" for name in GATED}),
]  # fmt: skip
NAMES = ["llama", "gpt2", "bert", "t5", "opt", "mllama", "perceiver", "timesformer", "moe"]


@pytest.mark.parametrize(("build", "attention", "mlp"), MEANINGS, ids=NAMES)
def test_attention_and_mlp_are_told_from_the_structure(
    build: Any, attention: set[str], mlp: set[str]
):
    model = build()
    found = {word: chosen(model, word) for word in ("attention", "mlp")}
    for word, names in (("attention", attention), ("mlp", mlp)):
        for name in names:
            assert any(re.search(rf"(^|\.|Self|EncDec){name}$", path) for path in found[word]), name
        for path in found[word]:
            assert any(re.search(rf"(^|\.|Self|EncDec){name}$", path) for name in names), path
    assert found["attention"].isdisjoint(found["mlp"])
    assert found["attention"] | found["mlp"] <= chosen(model, "all-linear")


def test_words_are_one_choice_among_others_and_the_plan_shows_it():
    model = moe()
    both = chosen(model, "attention", "experts")
    assert last(both) == {*LLAMA, "experts"}
    assert both == chosen(model, "attention") | chosen(model, "experts")
    assert chosen(model, "all-linear", "experts") > chosen(model, "all-linear")
    text = str(hf_lora.plan(model, ["attention", "lm_head", "experts"], r=2))
    assert "'attention' means 8 of them" in text
    assert "'experts' means 2 of them" in text


@pytest.mark.parametrize("word", ["attention", "mlp", "experts", "all-linear"])
def test_what_stays_untouched_is_all_that_is_in_no_adapted_layer(word: str):
    model = moe()
    plan = hf_lora.plan(model, word, r=2)
    adapted = [model.get_submodule(target.path) for target in plan.targets]
    inside = sum(p.numel() for module in adapted for p in module.parameters())
    assert plan.untouched == model.num_parameters() - inside
    share = 100 * plan.untouched / model.num_parameters()
    assert f"untouched: {share:.1f} % of the base's parameters" in str(plan)
    with torch.device("meta"):
        assert hf_lora.plan(moe(), word, r=2).untouched == plan.untouched


def test_a_tied_head_and_a_module_in_full_are_not_untouched():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, tie_word_embeddings=True))
    alone = hf_lora.plan(model, "attention", r=2).untouched
    head = hf_lora.plan(model, ["attention", "lm_head"], r=2)
    assert alone - head.untouched == model.lm_head.weight.numel()
    assert hf_lora.plan(model, "attention", r=2, train=["embed_tokens"]).untouched == head.untouched


def test_routers_and_what_weighs_a_shared_expert_are_no_mlp():
    assert not any("gate" in path.rpartition(".")[2] for path in chosen(moe(), "mlp", r=1) if
                   "gate_proj" not in path)  # fmt: skip
    assert "router" not in str(chosen(switch(), "mlp", r=1))


class TestExpertsWithLayersOfTheirOwn:
    def test_are_meant_by_their_word_and_by_no_other(self):
        experts = chosen(switch(), "experts")
        assert last(experts) == {"wi", "wo"}
        assert all(".experts." in path for path in experts)
        for word in ("attention", "mlp", "all-linear"):
            assert experts.isdisjoint(chosen(switch(), word))

    def test_are_told_of_where_all_linear_leaves_them_out(self):
        with pytest.warns(HfLoRAWarning, match="one of several experts, which 'experts' means"):
            hf_lora.wrap(switch(), r=2)

    def test_train_when_they_are_named(self):
        model = hf_lora.wrap(switch(), ["all-linear", "experts"], r=2)
        scramble(model)
        model(input_ids=TOKENS, decoder_input_ids=TOKENS).logits.sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if ".experts." in n and "lora" in n]
        assert any(grad is not None and grad.any() for grad in grads)


def test_words_hold_in_exclude_and_in_overrides():
    assert chosen(llama(), "all-linear", exclude=["mlp"]) == chosen(llama(), "attention")
    plan = hf_lora.plan(
        moe(), ["attention", "experts"], r=4, overrides={"experts": {"r": 1}}, exclude=["q_proj"]
    )
    ranks = {target.path.rpartition(".")[2]: target.slot.r for target in plan.targets}
    assert ranks == {"k_proj": 4, "v_proj": 4, "o_proj": 4, "experts": 1}


def test_train_means_modules_by_their_names_all_the_same():
    plan = hf_lora.plan(llama(), "attention", r=2, train=["mlp"])
    assert last(item.path for item in plan.trained) == {"mlp"}


class Own(nn.Module):
    """Modules with the names of words."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)


def test_a_module_of_that_name_is_meant_by_a_pattern():
    assert chosen(Own(), ".*attention") == {"attention"}
    with pytest.raises(TargetError, match=r"'attention' matches nothing.*'\.\*attention'"):
        hf_lora.wrap(Own(), ["attention"], r=2)


MISSING = [
    (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=48, hidden_size=32, state_size=4)),
        "attention",
        "no attention that is made of linear layers; here mean something: 'all-linear'",
    ),
    (llama, "experts", "no experts that can be adapted"),
    (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=4)),
        "mlp",
        "here mean something: 'all-linear', 'attention', 'experts'",
    ),
]


@pytest.mark.parametrize(("build", "word", "words"), MISSING, ids=[c[1] for c in MISSING])
def test_a_word_that_means_nothing_is_an_error_that_names_those_that_do(
    build: Any, word: str, words: str
):
    model = build()
    with pytest.raises(TargetError, match=re.escape(words)):
        hf_lora.wrap(model, [word], r=2)
    with pytest.raises(TargetError, match=re.escape(words)):
        hf_lora.wrap(model, [word, "norm"], r=2)


def test_a_head_and_layers_that_cannot_do_with_an_update_are_left_out_as_of_all_linear():
    config = hf.FalconMambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=1, state_size=8)
    model = hf.FalconMambaForCausalLM(config)
    both = hf_lora.plan(model, ["all-linear", "x_proj"], r=4)
    assert both.left_out["lm_head"] == "output head"
    assert any("dt_proj" in path for path in both.left_out)
    named = hf_lora.plan(model, ["all-linear", "lm_head"], r=4)
    assert "lm_head" in {target.path for target in named.targets}


def test_a_list_of_the_one_word_is_the_word():
    assert LoRAConfig(targets=["all-linear"]) == LoRAConfig(targets="all-linear")
    assert LoRAConfig(targets="mlp") == LoRAConfig(targets=["mlp"])


def test_an_adapter_of_words_saves_and_loads(tmp_path: Any):
    torch.manual_seed(0)
    model = hf_lora.wrap(moe(), ["attention", "experts"], r=2)
    scramble(model)
    base = moe()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    hf_lora.save(model, tmp_path)
    loaded = hf_lora.load(base, tmp_path)
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
