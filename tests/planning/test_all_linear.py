"""What ``"all-linear"`` takes and leaves out, on real models, and that it says so."""

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import HfLoRAWarning, TargetError
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


def llama4() -> Any:
    config = hf.Llama4TextConfig(
        **TEXT, intermediate_size_mlp=48, head_dim=8, num_local_experts=4, num_experts_per_tok=1
    )
    return hf.Llama4ForCausalLM(config)


def ibert() -> Any:
    return hf.IBertForMaskedLM(hf.IBertConfig(**SIZES))


def deepseek() -> Any:
    sizes = TEXT | {"num_key_value_heads": 1, "head_dim": 16}
    config = hf.DeepseekV4Config(
        **sizes,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    return hf.DeepseekV4ForCausalLM(config)


def idefics() -> Any:
    config = hf.IdeficsConfig(
        **SIZES, additional_vocab_size=2, vision_config={"hidden_size": 32, "num_hidden_layers": 1}
    )
    return hf.IdeficsForVisionText2Text(config)


def falcon_mamba() -> Any:
    sizes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    return hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**sizes))


def speech(model_class: Any, config_class: Any) -> Any:
    sizes = {**SIZES, "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4)}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = config_class(**sizes, **more, num_feat_extract_layers=2, classifier_proj_size=16)
    return model_class(config)


def wavlm() -> Any:
    return speech(hf.WavLMForCTC, hf.WavLMConfig)


def qwen_moe(**fields: Any) -> Any:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    routed = {"num_experts": 4, "num_experts_per_tok": 2}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**TEXT, **sizes, **routed, **fields))


def squeezebert() -> Any:
    return hf.SqueezeBertForMaskedLM(hf.SqueezeBertConfig(**SIZES, embedding_size=32))


def wrapped(model: Any, targets: Any = "all-linear", **fields: Any) -> tuple[Any, list[str]]:
    """Return the wrapped model, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf_lora.wrap(model, targets, **fields)
    ours = [w for w in caught if issubclass(w.category, HfLoRAWarning)]
    assert all(w.filename == __file__ for w in ours)
    return model, [str(w.message) for w in ours]


def adapted(model: nn.Module) -> set[str]:
    """Return the last names of the layers that have an update."""
    return {n.split(".")[-2] for n, _ in model.named_parameters() if n.endswith(".lora_A")}


LEFT_OUT = [
    (llama4, "router", "its forward returns a tuple"),
    (ibert, "query", "its forward returns a tuple"),
    (deepseek, "o_a_proj", "a trial run fails with"),
    (falcon_mamba, "dt_proj", "FalconMambaMixer's own code reads dt_proj.weight"),
    (wavlm, "q_proj", "WavLMAttention's own code reads q_proj.weight"),
    (qwen_moe, "shared_expert_gate", "smaller than r=16"),
]


@pytest.mark.parametrize(("build", "layer", "reason"), LEFT_OUT, ids=[c[1] for c in LEFT_OUT])
def test_what_cannot_do_with_an_update_is_left_out_and_told(build: Any, layer: str, reason: str):
    plan = hf_lora.plan(build())
    with torch.device("meta"):
        assert str(hf_lora.plan(build())) == str(plan)
    model, said = wrapped(build())
    (message,) = said
    assert re.search(rf"\.{layer}\b.*{re.escape(reason)}", message)
    assert any(layer in path and reason in why for path, why in plan.left_out.items())
    assert layer not in adapted(model)
    if build is not wavlm:
        model(TOKENS).logits.sum().backward()
    else:
        model(torch.randn(1, 160)).logits.sum().backward()


@pytest.mark.parametrize(("build", "layer"), [(llama4, "router"), (deepseek, "o_a_proj")])
def test_one_that_somebody_names_is_refused(build: Any, layer: str):
    with pytest.raises(TargetError, match="cannot be trained through"):
        hf_lora.wrap(build(), ["q_a_proj|q_proj", layer], r=4)


def test_layers_above_the_rank_are_refused_where_they_are_named_or_given_a_rank():
    with pytest.raises(TargetError, match="r=16 is larger than the layer's smaller side, 1"):
        hf_lora.wrap(qwen_moe(), ["q_proj", "shared_expert_gate"])
    with pytest.raises(TargetError, match="r=2 is larger than the layer's smaller side, 1"):
        hf_lora.wrap(qwen_moe(), overrides={"shared_expert_gate": {"r": 2}})
    model, _ = wrapped(qwen_moe(), overrides={"shared_expert_gate": {"r": 1}})
    assert "shared_expert_gate" in adapted(model)
    with pytest.raises(TargetError, match="r=16 is larger than the layer's smaller side, 8"):
        hf_lora.wrap(nn.Sequential(nn.Linear(8, 8)), r=16)


class TestExperts:
    NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @pytest.mark.parametrize(
        "targets",
        ["all-linear", NAMES, "(q|k|v|o|gate|up|down)_proj", [".*self_attn.*_proj", "w[123]"]],
        ids=["all-linear", "a list", "a pattern", "the names of Mixtral"],
    )
    def test_their_share_is_told_once(self, targets: Any):
        model = qwen_moe()
        experts = [p for name, p in model.named_parameters() if ".experts." in name]
        share = 100 * sum(p.numel() for p in experts) / model.num_parameters()
        _, said = wrapped(model, targets, exclude=["shared_expert_gate"], r=4)
        (message,) = said
        assert f"4 stacked parameters, as experts have them, {share:.1f} % of the" in message

    def test_a_model_without_dense_layers_is_no_typo(self):
        sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **sizes))
        model, said = wrapped(model, self.NAMES, r=4)
        assert len(said) == 1
        assert adapted(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        with pytest.raises(TargetError, match="'gate_proj' matches no module"):
            hf_lora.wrap(hf_lora.unwrap(model), ["gate_proj", "w1"], r=4)

    @pytest.mark.parametrize(
        "fields", [{"targets": ["q_proj"]}, {"exclude": ["experts", "shared_expert_gate"]}]
    )
    def test_nobody_is_told_of_what_was_not_meant(self, fields: dict):
        assert not wrapped(qwen_moe(), **fields)[1]


HEADS = [
    (squeezebert, {"cls.predictions.decoder"}, "cls.predictions.transform.dense"),
    (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), None, "cls.predictions.transform.dense"),
    (
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=48, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
        ),
        {"vocab_projector"},
        "vocab_transform",
    ),
    (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES)),
        {"classifier.out_proj"},
        "classifier.dense",
    ),
    (
        lambda: speech(hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config),
        {"classifier"},
        "projector",
    ),
]


@pytest.mark.parametrize(("build", "head", "inner"), HEADS, ids=[c[2] for c in HEADS])
def test_a_layer_inside_a_head_is_no_head(build: Any, head: set | None, inner: str):
    plan = hf_lora.plan(build(), r=2)
    found = {path for path, why in plan.left_out.items() if why == "output head"}
    assert found == (head or {"cls.predictions.decoder"})
    assert inner in {target.path for target in plan.targets}


def test_what_is_trained_of_squeezebert_is_seen_in_its_outputs():
    model = hf_lora.wrap(squeezebert(), r=4)
    scramble(model)
    model(TOKENS).logits.sum().backward()
    assert model.cls.predictions.transform.dense.lora_A.grad.any()


class Gated(nn.Module):
    """A layer with a gate of one output and a head of three."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.gate, self.score = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.tanh(self.fc(x)) * torch.sigmoid(self.gate(x)))


def test_a_file_of_pefts_with_a_rank_above_its_layers_loads_trains_and_saves(tmp_path: Path):
    config = peft.LoraConfig(r=8, target_modules=["fc", "gate", "score"])
    theirs = peft.get_peft_model(Gated(), config)
    scramble(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(4, 16)
    model = hf_lora.load(Gated(), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(model(x), theirs(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(
        model.gate.lora_A.grad, theirs.base_model.model.gate.lora_A["default"].weight.grad
    )
    optimizer.step()
    expected = model(x)
    hf_lora.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Gated(), tmp_path / "ours")
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(hf_lora.load(Gated(), tmp_path / "ours")(x), expected)
    torch.testing.assert_close(hf_lora.merge(model)(x), expected)
    assert hf_lora.summary(hf_lora.unmerge(model))
