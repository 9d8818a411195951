"""Adapters in the shapes in which other tools write them: right, or refused by name; none wrong.

The oracle is the formula: the base with s · B A added to its weights, and trained modules in place.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from tests.files import edit
from tests.files.refusing import refuse
from tests.files.wild import ALPHA, PREFIX, R, Shape, experts, llava, of, qwen_vl, text_model
from tests.oracle.adapting import TOLERANCE

QV = ("q_proj", "v_proj")


def llama(*tails: str, **fields: Any) -> Shape:
    shape = of("llama")
    return shape.adapt(shape.layers(*(tails or QV))).say(target_modules=list(tails or QV), **fields)


def matched(pattern: str) -> Shape:
    return llama().say(target_modules=pattern)


def ranked(pattern: str) -> Shape:
    """Another rank in the first layer's q_proj, with the strength that follows from it."""
    shape = of("llama").say(target_modules=list(QV), rank_pattern={pattern: 4})
    first = "model.layers.0.self_attn.q_proj"
    shape.adapt([path for path in shape.layers(*QV) if path != first])
    return shape.adapt([first], r=4, scale=ALPHA / 4)


def strong(pattern: str) -> Shape:
    shape = of("llama").say(target_modules=list(QV), alpha_pattern={pattern: 3})
    return shape.adapt(shape.layers("q_proj")).adapt(shape.layers("v_proj"), scale=3 / R)


def rooted(rank: int) -> Shape:
    shape = of("llama").say(target_modules=list(QV), use_rslora=True, rank_pattern={"v_proj": rank})
    shape.adapt(shape.layers("q_proj"), scale=ALPHA / R**0.5)
    return shape.adapt(shape.layers("v_proj"), r=rank, scale=ALPHA / rank**0.5)


def typed(dtype: torch.dtype) -> Shape:
    shape = of("llama").say(target_modules=list(QV))
    return shape.adapt(shape.layers(*QV), dtype=dtype)


def keyed(change: Callable[[str], str], words: str = "") -> Shape:
    return llama().rename(change).tell(words)


def layer(numbers: Any, *kept: str, **fields: Any) -> Shape:
    shape = of("llama").say(target_modules=list(QV), layers_to_transform=numbers, **fields)
    return shape.adapt(path for path in shape.layers(*QV) if any(f".{n}." in path for n in kept))


def headed(model: str, task: str, target: str, head: str, *, named: bool) -> Shape:
    shape = of(model)
    shape.adapt(shape.layers(target)).train(head)
    return shape.say(
        target_modules=[target],
        task_type=task,
        modules_to_save=["classifier", "score"] if named else None,
    )


def backbone_in_head() -> Shape:
    shape = llama().rename(lambda key: key.replace(f"{PREFIX}model.", PREFIX))
    return shape.tell("trained on the backbone alone")


def head_on_backbone() -> Shape:
    shape = llama().tell("was taken off its names")
    shape.twin, build = shape.twin.model, shape.build
    return shape.on(lambda: build().model)


def gpt2(**fields: Any) -> Shape:
    shape = of("gpt2")
    shape.adapt(shape.layers("c_attn", "c_fc"))
    return shape.say(target_modules=["c_attn", "c_fc"], **fields)


def in_qwen_vl(inside: str, *tails: str, old: str, new: str, target: Any) -> Shape:
    shape = qwen_vl()
    shape.adapt(shape.layers(*tails, inside=inside), name=lambda path: path.replace(new, old))
    return shape.say(target_modules=target).tell("names of an older transformers")


def text_on_vision() -> Shape:
    shape = llava()
    layers = shape.layers(*QV, inside="language_model")
    shape.adapt(layers, name=lambda path: path.replace("language_model.", ""))
    return shape.say(target_modules=list(QV)).tell("trained on another model")


def vision_on_text() -> Shape:
    shape = text_model()
    shape.adapt(
        shape.layers(*QV), name=lambda path: path.replace("model.", "model.language_model.")
    )
    return shape.say(target_modules=list(QV)).tell("trained on another model")


def old_llava() -> Shape:
    shape = llava()
    layers = shape.layers(*QV, inside="language_model")
    shape.adapt(layers, name=lambda p: p.replace("model.language_model.", "language_model.model."))
    return shape.say(target_modules=r"language_model\..*(q_proj|v_proj)").tell("older transformers")


def fewer(**options: Any) -> Shape:
    """As unsloth writes Gemma's layers that share keys and values."""
    shape = of("llama").say(target_modules=list(QV)).load_with(**options)
    return shape.adapt(shape.layers(*QV, inside="layers.0")).tell("2 in all")


def with_base_of_head(*, there: bool) -> Shape:
    shape = of("llama").say(target_modules=["q_proj", "lm_head"])
    own = shape.twin.lm_head.weight.detach().clone()
    shape.adapt([*shape.layers("q_proj"), "lm_head"])
    if there:
        shape.tensors[f"{PREFIX}lm_head.base_layer.weight"] = own
        shape.tell("only repeats the base's own weight")
    return shape


def early() -> Shape:
    """PEFT 0.2: few fields, and two that are gone since."""
    shape = llama(enable_lora=None, merge_weights=False, fan_in_fan_out=False, bias="none")
    return shape.say(inference_mode=True, lora_dropout=0.05, modules_to_save=None)


def complete() -> Shape:
    """PEFT 0.21: every field that it has."""
    off = "alora_invocation_tokens arrow_config corda_config eva_config exclude_modules \
        kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config \
        megatron_config modules_to_save monteclora_config revision target_parameters \
        trainable_token_indices use_bdlora velora_config"
    return llama(
        **dict.fromkeys(off.split()),
        **dict.fromkeys(("use_dora", "use_qalora", "use_rslora", "lora_bias"), False),
        **{"alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "bias": "none"},
        **{"ensure_weight_tying": False, "qalora_group_size": 16, "peft_version": "0.21.2"},
        **{"megatron_core": "megatron.core", "init_lora_weights": True, "task_type": "CAUSAL_LM"},
        auto_mapping=None,
    )


def by_weight() -> Shape:
    return llama().say(target_modules=[], target_parameters=["q_proj.weight", "v_proj.weight"])


def nothing_said(value: Any) -> Shape:
    return llama().say(target_modules=value).tell("no target_modules is named")


@torch.no_grad()
def biased(key: str, bias: str) -> Shape:
    """With biases of the base's own, under PEFT's name for them or under that before 0.6."""
    shape = of("bert")
    shape.adapt(shape.layers("query")).say(target_modules=["query"], bias=bias)
    for path in shape.layers("query"):
        own = shape.random(32)
        shape.tensors[f"{PREFIX}{path}.{key}"] = own
        shape.twin.get_submodule(path).bias.copy_(own)  # type: ignore[union-attr, operator]
    return shape


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
)
SWIFT = r"^(?!.*(?:lm_head|output|emb|wte|shared))model\.layers\.\d+\.self_attn\.(?:q_proj|v_proj)$"
FACTORY = r"^(?!.*(?:patch_embed|visual)).*(?:q_proj|v_proj).*"
AXOLOTL = r"model.layers.[\d]+.self_attn.(q|v)_proj"
FIRST = "model.layers.0.self_attn.q_proj"

RIGHT: dict[str, Callable[[], Shape]] = {
    "a list": llama,
    "tails with a dot": lambda: llama().say(target_modules=["self_attn.q_proj", "v_proj"]),
    "whole paths": lambda: llama().say(target_modules=of("llama").layers(*QV)),
    "a pattern": lambda: matched(r".*\.(q|v)_proj"),
    "unsloth's pattern": lambda: matched(UNSLOTH),
    "ms-swift's look-ahead": lambda: matched(SWIFT),
    "LLaMA-Factory's look-ahead": lambda: matched(FACTORY),
    "axolotl's pattern": lambda: matched(AXOLOTL),
    "all-linear": lambda: llama("_proj").say(target_modules="all-linear"),
    "ALL-LINEAR": lambda: llama("_proj").say(target_modules="ALL-LINEAR"),
    "rank_pattern by path": lambda: ranked(FIRST),
    "rank_pattern by tail": lambda: ranked("layers.0.self_attn.q_proj"),
    "rank_pattern by ms-swift": lambda: ranked(r"^(?!.*v_proj)model\.layers\.0\..*_proj$"),
    "alpha_pattern by tail": lambda: strong("v_proj"),
    "alpha_pattern by pattern": lambda: strong(r".*\.v_proj"),
    "rslora": lambda: rooted(2),
    "rslora of two ranks": lambda: rooted(4),
    "one layer": lambda: layer(1, "1"),
    "a list of layers": lambda: layer([0], "0", layers_pattern="layers"),
    "layers of several names": lambda: layer([1], "1", layers_pattern=["h", "layers"]),
    "excluded": lambda: layer(None, "1", exclude_modules=r".*layers\.0.*"),
    "a head in full": lambda: llama(modules_to_save=["lm_head"]).train("lm_head"),
    "embeddings in full": lambda: llama(modules_to_save=["embed_tokens"]).train(
        "model.embed_tokens"
    ),
    "a norm in full": lambda: llama(modules_to_save=["model.norm"]).train("model.norm"),
    "an adapted head": lambda: with_base_of_head(there=False),
    "an adapted head and the base's": lambda: with_base_of_head(there=True),
    "mergekit's fields": lambda: llama(rank_pattern={"q_proj": R}, alpha_pattern={}),
    "PEFT 0.2": early,
    "PEFT 0.21": complete,
    "a field of tomorrow": lambda: llama(use_tomorrow=True).tell("ignored: 'use_tomorrow'"),
    "bfloat16": lambda: typed(torch.bfloat16),
    "float16": lambda: typed(torch.float16),
    "no prefix": lambda: keyed(lambda key: key.removeprefix(PREFIX)),
    "a doubled prefix": lambda: keyed(lambda key: PREFIX + key, "taken off"),
    "torch.compile's names": lambda: keyed(
        lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod"
    ),
    "FSDP's names": lambda: keyed(
        lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."), "_fsdp_wrapped"
    ),
    "checkpointing's names": lambda: keyed(
        lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."), "_checkpoint"
    ),
    "DDP's names": lambda: keyed(lambda key: f"module.{key}", "'module.'"),
    "the name default": lambda: keyed(lambda key: key.replace(".weight", ".default.weight")),
    "another adapter's name": lambda: keyed(
        lambda key: key.replace(".weight", ".policy.weight"), r"'.policy' in the names"
    ),
    "another adapter's name and a head": lambda: (
        llama(modules_to_save=["lm_head"])
        .train("lm_head", name="lm_head.modules_to_save.policy")
        .rename(lambda k: k.replace(".weight", ".policy.weight") if ".lora_" in k else k)
        .tell("'.policy' in the names")
    ),
    "a backbone's in a head model": backbone_in_head,
    "a head model's in a backbone": head_on_backbone,
    "GPT-2": lambda: gpt2(fan_in_fan_out=True),
    "GPT-2 without fan_in_fan_out": gpt2,
    "a classifier": lambda: headed("bert", "SEQ_CLS", "query", "classifier", named=True),
    "a classifier without a name": lambda: headed(
        "bert", "SEQ_CLS", "query", "classifier", named=False
    ),
    "an image classifier": lambda: headed("vit", "SEQ_CLS", "q_proj", "classifier", named=False),
    "no target_modules": lambda: nothing_said(...),
    "target_modules null": lambda: nothing_said(None),
    "fewer layers, and known": lambda: fewer(missing="zero"),
    "bias lora_only where there is none": lambda: llama(bias="lora_only"),
    "bias all where there is none": lambda: llama(bias="all"),
    "biases": lambda: biased("base_layer.bias", "lora_only"),
    "biases under old names": lambda: biased("bias", "lora_only"),
    "weights by name": by_weight,
    "Qwen2-VL of version 4": lambda: in_qwen_vl(
        "language", *QV, old="model.", new="model.language_model.", target=list(QV)
    ),
    "Qwen2-VL of version 4, a pattern": lambda: in_qwen_vl(
        "language",
        *QV,
        old="model.",
        new="model.language_model.",
        target=r"^model\..*(q_proj|v_proj)$",
    ),
    "Qwen2-VL of version 4, the tower": lambda: in_qwen_vl(
        "visual", "qkv", old="visual.", new="model.visual.", target=["qkv"]
    ),
    "LLaVA of version 4": old_llava,
    "a text model's on a vision-language model": text_on_vision,
    "a vision-language model's on a text model": vision_on_text,
    "PiSSA, converted": lambda: llama(init_lora_weights=True, revision=None),
    "EVA's start": lambda: llama(init_lora_weights="eva", eva_config={"rho": 2.0}),
    "an orthogonal start": lambda: llama(init_lora_weights="orthogonal"),
}


def expert(kind: str, *names: str) -> Shape:
    """An adapter of version 4 of transformers, where each expert was a module."""
    shape = experts(kind)
    shape.adapt(shape.layers(*QV))
    for name in names:
        for number, (out, into) in enumerate([(16, 32)] * 4):
            at = f"{PREFIX}model.layers.0.mlp.experts.{number}.{name}"
            shape.tensors[f"{at}.lora_A.weight"] = shape.random(R, into)
            shape.tensors[f"{at}.lora_B.weight"] = shape.random(out, R)
    return shape.say(target_modules=[*QV, *names])


def more(key: str, *size: int, **fields: Any) -> Shape:
    shape = llama(**fields)
    shape.tensors[f"{PREFIX}{key}"] = shape.random(*size)
    return shape


REFUSED: dict[str, tuple[Callable[[], Shape], str]] = {
    "PiSSA": (lambda: llama(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
    "PiSSA, quick": (lambda: llama(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "OLoRA": (lambda: llama(init_lora_weights="olora"), "init_lora_weights = 'olora'"),
    "DoRA": (lambda: llama(use_dora=True), "use_dora"),
    "aLoRA": (lambda: llama(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "QA-LoRA": (lambda: llama(use_qalora=True), "use_qalora"),
    "tokens": (lambda: llama(trainable_token_indices=[1]), "trainable_token_indices"),
    "half of an embedding's": (
        lambda: more("model.embed_tokens.lora_embedding_A", R, 96),
        "model.embed_tokens has lora_embedding_A but not its partner",
    ),
    "a bias that was lost": (lambda: llama(lora_bias=True), "it has no bias on B"),
    "a bias in the file": (lambda: more(f"{FIRST}.lora_B.bias", 32), "lora_bias is False"),
    "biases that were lost": (
        lambda: (
            of("bert").say(target_modules=["query"], bias="all").adapt(of("bert").layers("query"))
        ),
        "query.bias was trained, and is not in the file",
    ),
    "replicated layers": (lambda: llama(layer_replication=[[0, 2]]), "layer_replication"),
    "experts' parameters": (
        lambda: llama(target_parameters=["experts.gate_up_proj"]),
        "target_parameters",
    ),
    "VeRA": (lambda: llama(peft_type="VERA"), "'VERA'"),
    "LoHa": (lambda: llama(peft_type="LOHA"), "'LOHA'"),
    "IA3": (lambda: llama(peft_type="IA3"), "'IA3'"),
    "Mixtral of version 4": (lambda: expert("Mixtral", "w1", "w3"), "experts"),
    "Qwen3-MoE of version 4": (lambda: expert("Qwen3Moe", "gate_proj", "up_proj"), "experts"),
    "fewer layers": (fewer, "missing='zero'"),
    "several adapters": (
        lambda: llama().rename(
            lambda key: key.replace(".weight", ".a.weight" if ".0." in key else ".b.weight")
        ),
        "several adapters",
    ),
    "half a pair": (
        lambda: llama().rename(lambda key: key.replace("0.self_attn.q_proj.lora_B", "0.x.lora_B")),
        "has lora_A but not its partner",
    ),
    "resized embeddings": (lambda: more("model.embed_tokens.weight", 100, 32), "(100, 32)"),
    "another width": (lambda: llama("up_proj").on(text_model().build), "does not fit"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_shape_that_is_read_right(tmp_path: Path, name: str):
    shape = RIGHT[name]()
    shape.write(tmp_path)
    telling = (
        pytest.warns(hf_lora.HfLoRAWarning, match=shape.said)
        if shape.said
        else contextlib.nullcontext()
    )
    with telling:
        model = hf_lora.load(shape.build(), tmp_path, **shape.options)
    with torch.no_grad():
        found, expected = (first(m(**shape.inputs)) for m in (model, shape.twin))
        plain = first(shape.build()(**shape.inputs))
    assert far(plain, expected) > 0.01
    assert far(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_a_shape_that_is_refused_by_name(tmp_path: Path, name: str):
    make, words = REFUSED[name]
    shape = make()
    shape.write(tmp_path)
    refuse(tmp_path, words, model=shape.build())


def test_a_pickle_is_refused(tmp_path: Path):
    llama().write(tmp_path)
    (tmp_path / edit.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refuse(tmp_path, "pickle", model=of("llama").build())


def test_most_shapes_are_read():
    assert len(RIGHT) >= 48


def first(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()
