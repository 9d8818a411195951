"""A diffusion transformer (Flux) and its pipeline: every verb of diffusers, right or refused."""

from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers as hf
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_lora
from hf_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    ConfigError,
    SaveError,
    StateError,
    UnsupportedAdapterError,
)
from hf_lora.integrations import diffusion_pipelines
from hf_lora.integrations.in_front import is_in_front
from hf_lora.model.registry import find
from tests.families.walk import ADAPTER, TOLERANCE, Family, distance
from tests.integrations import training

LATENTS, CHANNELS, WORDS = 16, 4, 5
TARGETS = ["attention", r"ff\.net\.0\.proj"]
FIELDS = {"targets": TARGETS, "r": 2, "alpha": 6.0, "overrides": {"to_q": {"r": 3, "alpha": 5.0}}}
FILE = "pytorch_lora_weights.safetensors"


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux() -> Any:
    return FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=32,
        axes_dims_rope=(2, 2, 4),
    )


def inputs() -> dict[str, Any]:
    return {
        "hidden_states": drawn(1, LATENTS, CHANNELS),
        "encoder_hidden_states": drawn(1, WORDS, 16, seed=2),
        "pooled_projections": drawn(1, 32, seed=3),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.arange(LATENTS).float() % n for n in (1, 4, 5)], 1),
        "txt_ids": torch.zeros(WORDS, 3),
        "return_dict": True,
    }


FLUX = Family("flux", flux, inputs, "sample")


def encoder() -> Any:
    """The text encoder, which has its own model of transformers."""
    config = hf.CLIPTextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return hf.CLIPTextModel(config)


READS = Family("clip", encoder, lambda: {"input_ids": torch.arange(7)[None]}, "pooler_output")


def pipeline(folder: Path | None = None, wrap: bool = True, reads: bool = False) -> Any:
    """A pipeline, of bases in a folder if there is one; its transformer is wrapped."""
    transformer, text = FLUX.made(), READS.made() if reads else None
    if folder is not None:
        transformer.save_pretrained(folder / "transformer")
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer").eval()
        if text is not None:
            text.save_pretrained(folder / "text")
            text = hf.CLIPTextModel.from_pretrained(folder / "text").eval()
    if wrap:
        hf_lora.wrap(transformer, **FIELDS)
        training.scramble(transformer)
        if text is not None:
            hf_lora.wrap(text, ["q_proj", "v_proj"], r=2, alpha=3.0)
            training.scramble(text, seed=4)
    scheduler = FlowMatchEulerDiscreteScheduler()
    parts = {"text_encoder_2": None, "tokenizer_2": None, "tokenizer": None, "vae": None}
    return FluxPipeline(scheduler=scheduler, transformer=transformer, text_encoder=text, **parts)


def answers(pipe: Any) -> torch.Tensor:
    return FLUX.answers(pipe.transformer)


def words(pipe: Any) -> torch.Tensor:
    return READS.answers(pipe.text_encoder)


def test_from_a_plan_to_the_base_again(tmp_path: Path):
    base = FLUX.made()
    base.save_pretrained(tmp_path / "base")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "base").eval()
    plain, before = FLUX.answers(model), training.snapshot(model)
    plan = hf_lora.plan(model, **FIELDS)
    assert not plan.problems
    assert len(plan.targets) == 12, [target.path for target in plan.targets]
    hf_lora.wrap(model, **FIELDS)
    assert torch.equal(FLUX.answers(model), plain)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(2):
        model.train()(**inputs()).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {k: v for k, v in training.snapshot(model).items() if k in before}
    assert training.same(after, before)
    training.scramble(model)
    adapted = FLUX.answers(model)
    model.save_pretrained(tmp_path / "adapter")
    assert training.files(tmp_path / "adapter") == ADAPTER
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "adapter").eval()
    assert distance(FLUX.answers(again), adapted) < TOLERANCE
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "base").eval()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert distance(FLUX.answers(theirs), adapted) < TOLERANCE
    hf_lora.merge(model)
    assert distance(FLUX.answers(model), adapted) < 10 * TOLERANCE
    hf_lora.unmerge(model)
    assert torch.equal(FLUX.answers(model), adapted)
    hf_lora.unwrap(model)
    assert training.same(training.snapshot(model), before)
    assert torch.equal(FLUX.answers(model), plain)


class TestThePipelinesFiles:
    def test_it_saves_adapters_and_opens_them(self, tmp_path: Path):
        pipe = pipeline(tmp_path)
        pipe.save_pretrained(tmp_path / "saved")
        assert training.files(tmp_path / "saved" / "transformer") == ADAPTER
        none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        none |= dict.fromkeys(("image_encoder", "feature_extractor"))
        again = FluxPipeline.from_pretrained(tmp_path / "saved", **none)
        assert distance(answers(again), answers(pipe)) < TOLERANCE

    def test_its_own_format_is_read_by_a_plain_pipeline(self, tmp_path: Path):
        """By diffusers and PEFT; ranks and alphas differ from layer to layer."""
        pipe = pipeline(tmp_path, reads=True)
        FluxPipeline.save_lora_weights(
            tmp_path / "lora",
            transformer_lora_layers=pipe.transformer,
            text_encoder_lora_layers=pipe.text_encoder,
        )
        assert training.files(tmp_path / "lora") == {FILE}
        plain = pipeline(tmp_path, wrap=False, reads=True)
        before = answers(plain), words(plain)
        plain.load_lora_weights(tmp_path / "lora")
        assert distance(answers(plain), answers(pipe)) < TOLERANCE
        assert distance(words(plain), words(pipe)) < TOLERANCE
        assert distance(before[0], answers(pipe)) > 100 * TOLERANCE
        assert distance(before[1], words(pipe)) > 100 * TOLERANCE

    def test_a_wrapped_pipeline_reads_it(self, tmp_path: Path):
        pipe, other = pipeline(tmp_path, reads=True), pipeline(tmp_path, reads=True)
        FluxPipeline.save_lora_weights(
            tmp_path / "lora", pipe.transformer, text_encoder_lora_layers=pipe.text_encoder
        )
        for part in (other.transformer, other.text_encoder):
            training.scramble(part, seed=9)
        other.load_lora_weights(tmp_path / "lora", adapter_name="style")
        assert distance(answers(other), answers(pipe)) < TOLERANCE
        assert distance(words(other), words(pipe)) < TOLERANCE
        assert other.get_list_adapters() == {
            "text_encoder": ["default", "style"],
            "transformer": ["default", "style"],
        }
        assert other.get_active_adapters() == ["style"]
        assert hf_lora.adapters(other.transformer)["style"].overrides  # ranks of its own

    def test_a_wrapped_pipeline_reads_what_diffusers_writes(self, tmp_path: Path):
        theirs = pipeline(tmp_path, wrap=False)
        names = ["to_q", "to_k", "proj_mlp"]
        theirs.transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=7, target_modules=names))
        training.scramble(theirs.transformer)
        theirs.transformer.save_lora_adapter(tmp_path / "theirs")
        kept = load_file(tmp_path / "theirs" / FILE)
        ours = pipeline(tmp_path)
        ours.transformer.load_lora_adapter(tmp_path / "theirs", prefix=None, adapter_name="a")
        assert distance(answers(ours), answers(theirs)) < TOLERANCE
        # without a header, PEFT's alpha is the rank
        below = {f"transformer.{key}": value for key, value in kept.items()}
        save_file(below, tmp_path / "bare.safetensors")
        for pipe in (ours, pipe2 := pipeline(tmp_path, wrap=False)):
            pipe.load_lora_weights(tmp_path, weight_name="bare.safetensors", adapter_name="b")
        assert distance(answers(ours), answers(pipe2)) < TOLERANCE
        # with alphas beside the factors
        alphas = {
            f"{k.removesuffix('.lora_A.weight')}.alpha": torch.tensor(5.0)
            for k in below
            if "lora_A" in k
        }
        for pipe in (ours, pipe2):
            pipe.load_lora_weights({**below, **alphas}, adapter_name="c")
            pipe.set_adapters("c")
        assert distance(answers(ours), answers(pipe2)) < TOLERANCE

    def test_a_models_own_file_goes_round(self, tmp_path: Path):
        model = pipeline().transformer
        model.save_lora_adapter(tmp_path / "own")
        with safe_open(tmp_path / "own" / FILE, "pt") as file:
            assert "lora_adapter_metadata" in file.metadata()
        other = pipeline().transformer
        training.scramble(other, seed=9)
        other.load_lora_adapter(tmp_path / "own", prefix=None)
        assert other.active_adapters() == ["default_0"]
        assert distance(FLUX.answers(other), FLUX.answers(model)) < TOLERANCE
        theirs = FLUX.made()
        theirs.load_lora_adapter(tmp_path / "own", prefix=None, use_safetensors=True)
        assert distance(FLUX.answers(theirs), FLUX.answers(model)) < TOLERANCE


class TestThePipelinesVerbs:
    def test_adapters_are_chosen_switched_off_and_taken_off(self, tmp_path: Path):
        pipe, plain = pipeline(reads=True), pipeline(wrap=False, reads=True)
        hf_lora.freeze(pipe.transformer, "default")
        first = answers(pipe)
        hf_lora.add_adapter(pipe.transformer, "second", targets="to_v", r=2)
        hf_lora.activate(pipe.transformer, "second")
        training.scramble(pipe.transformer, seed=8)
        second = answers(pipe)
        pipe.set_adapters("default")
        assert torch.equal(answers(pipe), first)
        pipe.set_adapters(["default", "second"], [{"transformer": 0.0}, 1.0])
        assert distance(answers(pipe), second) < TOLERANCE
        assert hf_lora.active_adapters(pipe.text_encoder) == ("default",)
        pipe.set_adapters("second")
        assert hf_lora.active_adapters(pipe.text_encoder) == ()
        pipe.disable_lora()
        assert torch.equal(answers(pipe), answers(plain))
        pipe.enable_lora()
        assert torch.equal(answers(pipe), second)
        pipe.delete_adapters("default")
        assert pipe.get_list_adapters() == {"transformer": ["second"]}
        pipe.unload_lora_weights()
        assert find(pipe.transformer) is None
        assert torch.equal(answers(pipe), answers(plain))
        assert torch.equal(words(pipe), words(plain))

    def test_fusing_is_a_merge(self):
        pipe = pipeline(reads=True)
        before, half = answers(pipe), None
        with hf_lora.use_adapter(pipe.transformer, {"default": 0.5}):
            half = answers(pipe)
        pipe.fuse_lora(lora_scale=0.5)
        assert distance(answers(pipe), half) < 10 * TOLERANCE
        pipe.unfuse_lora()
        assert torch.equal(answers(pipe), before)

    def test_pefts_adapters_beside_ours_are_refused(self):
        pipe = pipeline(reads=True)
        hf_lora.unwrap(pipe.transformer)
        pipe.transformer.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
        with pytest.raises(StateError, match="text_encoder has hf_lora's adapters and transformer"):
            pipe.disable_lora()

    def test_a_plain_pipeline_has_its_own_verbs(self):
        pipe = pipeline(wrap=False)
        assert pipe.get_list_adapters() == {}
        pipe.transformer.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
        assert pipe.get_list_adapters() == {"transformer": ["default"]}
        pipe.disable_lora()
        pipe.enable_lora()
        pipe.unload_lora_weights()


class TestWhatIsRefused:
    def test_a_folder_of_pefts_that_a_pipeline_passes_over(self, tmp_path: Path):
        pipe = pipeline()
        hf_lora.save(pipe.transformer, tmp_path / "pefts")
        before = answers(pipe)
        kept = load_file(tmp_path / "pefts" / "adapter_model.safetensors")
        with pytest.raises(AdapterFileError, match="no name begins with 'transformer'"):
            pipe.transformer.load_lora_adapter(kept)
        assert torch.equal(answers(pipe), before)

    def test_other_shapes_leave_the_model_as_it_was(self):
        pipe = pipeline()
        before = answers(pipe)
        wrong = {f"transformer.x_embedder.lora_{n}.weight": torch.ones(3, 3) for n in "AB"}
        with pytest.raises(AdapterMismatchError):
            pipe.transformer.load_lora_adapter(wrong)
        assert pipe.get_list_adapters() == {"transformer": ["default"]}
        assert torch.equal(answers(pipe), before)

    def test_dora_and_other_tensors(self):
        model = pipeline().transformer
        factors = {
            f"transformer.x_embedder.lora_{n}.weight": torch.ones(16, 16)[
                : 2 if n == "A" else 16, : 4 if n == "A" else 2
            ]
            for n in "AB"
        }
        said = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.use_dora": True}
        with pytest.raises(UnsupportedAdapterError, match="use_dora"):
            model.load_lora_adapter(factors, metadata=said)
        with pytest.raises(AdapterFileError, match="lokr_w1"):
            model.load_lora_adapter({**factors, "transformer.x_embedder.lokr_w1": torch.ones(2, 2)})

    def test_what_diffusers_files_cannot_hold(self, tmp_path: Path):
        model = hf_lora.wrap(FLUX.made(), "to_q", r=2, train=["proj_out"])
        with pytest.raises(SaveError, match=r"proj_out"):
            model.save_lora_adapter(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("call", "error", "words"),
        [
            (lambda m: m.save_lora_adapter("x", safe_serialization=False), StateError, "pickle"),
            (lambda m: m.save_lora_adapter("x", upcast_before_saving=True), StateError, "float32"),
            (lambda m: m.set_adapters("default", {"block": 1.0}), ConfigError, "each block"),
            (lambda m: m.set_adapters(["default"], [1.0, 2.0]), ConfigError, "2 weights"),
            (lambda m: m.enable_lora_hotswap(target_rank=8), StateError, "hotswap=True"),
        ],
    )
    def test_arguments_that_cannot_be_honoured(self, call: Any, error: Any, words: str):
        with pytest.raises(error, match=words):
            call(pipeline().transformer)

    def test_names_of_our_own_in_the_place_of_a_model(self, tmp_path: Path):
        model = pipeline().transformer
        own = {n: t for n, t in model.state_dict().items() if "lora" in n}
        with pytest.raises(StateError, match=r"transformer_lora_layers=pipeline\.transformer"):
            FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=own)


def test_what_hf_lora_hooks_into_is_there():
    pipeline()
    for name in diffusion_pipelines._METHODS:
        owner = vars(diffusers.loaders.lora_base.LoraBaseMixin)
        assert is_in_front(owner[name]), name
