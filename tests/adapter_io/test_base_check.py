"""A load onto another base is refused, whatever is other: also where nothing was targeted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes as bnb
import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import AdapterMismatchError, BaseMismatchError
from hf_lora.layers.quantized import float_values, float_weight
from tests import tiny
from tests.files import edit
from tests.model.models import TOKENS, classifier, gpt2, llama, t5


def saved(folder: Path, model: nn.Module, **fields: Any) -> Path:
    """Save an adapter that says something."""
    hf_lora.wrap(model, **{"targets": ["q_proj", "v_proj"], "r": 2} | fields)
    tiny.scramble(model)
    hf_lora.save(model, folder)
    return folder


def refusal(folder: Path, model: nn.Module) -> str:
    """Load, and return what the error says; the same must go through where it is asked for."""
    with pytest.raises(BaseMismatchError) as caught:
        hf_lora.load(model, folder)
    assert "check_base=False" in str(caught.value)
    hf_lora.load(model, folder, check_base=False)
    return str(caught.value)


def other(parameter: torch.Tensor) -> torch.Tensor:
    return torch.randn(parameter.shape) * (parameter.std() if parameter.numel() > 1 else 1) + 0.1


BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj"]),
    "tied": (lambda: llama(tied=True), ["q_proj", "v_proj"]),
    "gpt2": (gpt2, ["c_attn"]),
    "t5": (t5, [r"encoder\..*\.q"]),
    "bert": (classifier, ["query"]),
}


@pytest.mark.parametrize(("build", "targets"), BASES.values(), ids=BASES.keys())
def test_any_tensor_of_the_base_that_is_other_is_named(
    build: Callable[[], nn.Module], targets: list[str], tmp_path: Path
):
    saved(tmp_path, build(), targets=targets)
    hf_lora.load(build(), tmp_path)
    for name, _ in build().named_parameters():
        model = build()
        with torch.no_grad():
            changed = model.get_parameter(name)
            changed.copy_(other(changed))
        assert f"{name}: the numbers differ" in refusal(tmp_path, model)


def test_what_an_adapter_trains_in_full_may_be_other(tmp_path: Path):
    model = saved(tmp_path, classifier(), targets=["query"], train=["classifier"])
    model = classifier()
    with torch.no_grad():
        model.classifier.weight.normal_()
    hf_lora.load(model, tmp_path)


def test_buffers_are_part_of_the_base(tmp_path: Path):
    def build(mean: float) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
        model[1].running_mean.fill_(mean)
        return model

    saved(tmp_path, build(0.5), targets=["0"])
    hf_lora.load(build(0.5), tmp_path)
    assert "1.running_mean: the numbers differ" in refusal(tmp_path, build(0.7))


class TestShapes:
    @pytest.mark.parametrize(("then", "now"), [(2, 3), (3, 2), (1, 4)])
    def test_another_depth(self, tmp_path: Path, then: int, now: int):
        """Llamas of one seed have equal blocks where both have them."""
        saved(tmp_path, llama(layers=then), targets=[r"layers\.0\..*q_proj"])
        words = f"model.layers has {now} blocks, in the base that it was trained on {then}"
        assert words in refusal(tmp_path, llama(layers=now))

    def test_another_width_beside_the_targets(self, tmp_path: Path):
        saved(tmp_path, llama())
        message = refusal(tmp_path, llama(intermediate_size=48))
        assert "mlp.up_proj.weight has shape (48, 32), in the base (40, 32)" in message

    def test_a_bias_or_a_norm_that_only_one_has(self, tmp_path: Path):
        saved(tmp_path, llama())
        biased = llama(mlp_bias=True)
        biased.load_state_dict(llama().state_dict(), strict=False)
        message = refusal(tmp_path, biased)
        assert "model.layers.0.mlp.up_proj.bias is in this model only" in message
        model = llama()
        model.model.layers[0].self_attn.q_norm = nn.LayerNorm(8)
        message = refusal(tmp_path, model)
        assert "model.layers.0.self_attn.q_norm is in this model only" in message

    def test_a_part_beside_the_blocks_is_compared_where_both_have_it(self, tmp_path: Path):
        """An adapter of a language model may start a reward model."""
        saved(tmp_path, llama())
        scorer = hf.LlamaForSequenceClassification(llama().config)
        scorer.model.load_state_dict(llama().model.state_dict())
        hf_lora.load(scorer, tmp_path)
        hf_lora.unwrap(scorer)
        with torch.no_grad():
            scorer.model.norm.weight.mul_(1.5)
        assert "model.norm.weight" in refusal(tmp_path, scorer)


class TestVocabulary:
    def test_more_tokens_are_the_same_base(self, tmp_path: Path):
        for tied in (False, True):
            saved(tmp_path / str(tied), llama(tied=tied))
            grown = llama(tied=tied)
            grown.resize_token_embeddings(57, mean_resizing=False)
            hf_lora.load(grown, tmp_path / str(tied))

    @pytest.mark.parametrize("part", ["model.embed_tokens", "lm_head"])
    def test_the_rows_that_both_have_are_compared(self, tmp_path: Path, part: str):
        saved(tmp_path, llama())
        grown = llama()
        grown.resize_token_embeddings(57, mean_resizing=False)
        with torch.no_grad():
            grown.get_submodule(part).weight[:48].normal_()
        message = refusal(tmp_path, grown)
        assert f"{part}.weight: the numbers differ" in message
        assert message.count("\n") == 2  # the headline, this, the advice

    def test_fewer_tokens_are_refused_with_the_way(self, tmp_path: Path):
        grown = llama()
        grown.resize_token_embeddings(57, mean_resizing=False)
        saved(tmp_path, grown)
        message = refusal(tmp_path, llama())
        assert "vocabulary of 57 tokens, this model has 48" in message
        assert "resize_token_embeddings(57)" in message

    def test_a_head_of_another_size_is_no_vocabulary(self, tmp_path: Path):
        def build(width: int) -> nn.Module:
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, width))

        saved(tmp_path, build(3), targets=["0"])
        assert "1.weight has shape (4, 8), in the base (3, 8)" in refusal(tmp_path, build(4))


class TestTies:
    def test_a_tied_tensor_is_kept_once(self, tmp_path: Path):
        saved(tmp_path, llama(tied=True))
        header = json.loads(edit.read_tensors(tmp_path)[1]["hf_lora"])["fingerprint"]
        assert header["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" not in header["tensors"]

    def test_an_untied_copy_is_the_same_base_and_an_untied_other_is_not(self, tmp_path: Path):
        saved(tmp_path, llama(tied=True))
        model = llama()
        model.load_state_dict(llama(tied=True).state_dict())
        hf_lora.load(model, tmp_path)
        hf_lora.unwrap(model)
        with torch.no_grad():
            model.lm_head.weight.normal_()
        assert "lm_head.weight: the numbers differ" in refusal(tmp_path, model)

    def test_a_tied_model_is_not_one_with_a_head_of_its_own(self, tmp_path: Path):
        saved(tmp_path, llama())
        tied = llama(tied=True)
        tied.load_state_dict(
            llama().state_dict() | {"lm_head.weight": llama().model.embed_tokens.weight}
        )
        assert "lm_head.weight: the numbers differ" in refusal(tmp_path, tied)


class TestOtherNames:
    @pytest.mark.filterwarnings("ignore::hf_lora.errors.HfLoRAWarning")
    @pytest.mark.parametrize("part", ["embed_tokens", "layers.1.mlp.up_proj", "norm"])
    def test_from_a_backbone_and_onto_one(self, tmp_path: Path, part: str):
        saved(tmp_path / "whole", llama())
        saved(tmp_path / "backbone", llama().model)
        for source, target in (("whole", llama().model), ("backbone", llama())):
            hf_lora.load(target, tmp_path / source)
            hf_lora.unwrap(target)
            backbone = getattr(target, "model", target)
            with torch.no_grad():
                backbone.get_submodule(part).weight.normal_()
            assert f"{part}.weight: the numbers differ" in refusal(tmp_path / source, target)

    def test_where_blocks_are_compiled(self, tmp_path: Path):
        def compiled() -> nn.Module:
            model = llama()
            for block in model.model.layers:
                block.mlp = torch.compile(block.mlp)
            return model

        saved(tmp_path / "plain", llama())
        saved(tmp_path / "compiled", compiled())
        for source, build in (("plain", compiled), ("compiled", llama), ("compiled", compiled)):
            hf_lora.load(build(), tmp_path / source)
            model = build()
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.normal_()
            assert "up_proj.weight: the numbers" in refusal(tmp_path / source, model)


class TestOtherTypes:
    @pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("now", [torch.float32, torch.bfloat16, torch.float16])
    def test_another_type_is_the_same_base(
        self, tmp_path: Path, then: torch.dtype, now: torch.dtype
    ):
        saved(tmp_path, llama().to(then))
        hf_lora.load(llama().to(now), tmp_path)

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_a_quantized_base_is_the_same_and_one_with_another_part_is_not(
        self, tmp_path: Path, quant_type: str
    ):
        saved(tmp_path / "plain", llama(hidden_size=64, intermediate_size=64))
        for part in (None, "mlp.up_proj", "self_attn.k_proj", "input_layernorm"):
            model = llama(hidden_size=64, intermediate_size=64)
            if part is not None:
                changed = model.model.layers[1].get_submodule(part).weight
                with torch.no_grad():
                    changed.copy_(other(changed))
            four_bit(model, quant_type)
            if part is None:
                saved(tmp_path / "packed", hf_lora.unwrap(hf_lora.load(model, tmp_path / "plain")))
                hf_lora.load(llama(hidden_size=64, intermediate_size=64), tmp_path / "packed")
            else:
                for source in ("plain", "packed"):
                    message = refusal(tmp_path / source, model)
                    assert f"model.layers.1.{part}.weight: the numbers differ" in message
                    assert message.count("\n") == 2
                    hf_lora.unwrap(model)

    def test_an_unquantized_norm_is_compared_closely_beside_quantized_layers(self, tmp_path: Path):
        saved(tmp_path, four_bit(llama(hidden_size=64, intermediate_size=64)))
        model = four_bit(llama(hidden_size=64, intermediate_size=64))
        with torch.no_grad():
            model.model.norm.weight.mul_(1.02)
        assert "model.norm.weight: the numbers differ by 2.0%" in refusal(tmp_path, model)


def four_bit(model: nn.Module, quant_type: str = "nf4") -> nn.Module:
    """Replace the layers of a Llama's blocks by 4-bit ones, in place."""
    for block in model.model.layers:
        for name, layer in [*block.named_modules()]:
            if isinstance(layer, nn.Linear):
                parent, _, child = name.rpartition(".")
                packed = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type=quant_type
                )
                packed.weight = bnb.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type=quant_type
                )
                setattr(block.get_submodule(parent), child, packed)
    return model.to("cpu")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_single_numbers_of_a_packed_weight(kind: str, nested: bool):
    torch.manual_seed(1)
    if kind == "int8":
        layer: Any = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False).to("cpu")
    else:
        layer = bnb.nn.Linear4bit(128, 96, quant_type=kind, compress_statistics=nested).to("cpu")
    whole = float_weight(layer)
    assert whole is not None
    for at in (range(0, 128 * 96, 7), range(5, 6), range(0)):
        values = float_values(layer, at)
        assert values is not None
        expected = whole.reshape(-1)[torch.tensor(at, dtype=torch.long)]
        torch.testing.assert_close(values.float(), expected.float(), rtol=1e-5, atol=1e-8)


class TestWhereWeightsAreElsewhere:
    @pytest.mark.parametrize("place", ["cpu", "disk"])
    def test_an_offloaded_base(self, tmp_path: Path, place: str):
        def offloaded(model: nn.Module, name: str) -> nn.Module:
            if place == "cpu":
                return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            where = tmp_path / name
            return accelerate.disk_offload(model, where, execution_device=torch.device("cpu"))

        saved(tmp_path / "ours", offloaded(tiny.Net(), "ours base"))
        saved(tmp_path / "plain", tiny.Net())
        for source in ("ours", "plain"):
            hf_lora.load(tiny.Net(), tmp_path / source)
            model = tiny.Net()
            with torch.no_grad():
                model.layers[1].norm.weight.normal_()
            model = offloaded(model, f"other {source}")
            assert "layers.1.norm.weight: the num" in refusal(tmp_path / source, model)

    def test_what_a_merge_has_put_aside_is_the_base(self, tmp_path: Path):
        saved(tmp_path / "first", tiny.Net())
        model = hf_lora.load(tiny.Net(), tmp_path / "first")
        hf_lora.merge(model)
        hf_lora.save(model, tmp_path / "merged")
        files = [(tmp_path / name / edit.WEIGHTS).read_bytes() for name in ("first", "merged")]
        assert files[0] == files[1]

    def test_a_base_without_data_is_told(self, tmp_path: Path):
        saved(tmp_path, tiny.Net())
        model = tiny.Net()
        model.head.to("meta")
        with pytest.raises(hf_lora.StateError, match=r"1 modules are on the meta device.*head"):
            hf_lora.load(model, tmp_path)

    def test_weights_that_lie_otherwise_in_memory(self, tmp_path: Path):
        def transposed(seed: int = 0) -> tiny.Net:
            model = tiny.Net(seed=seed)
            for layer in model.layers:
                layer.v_proj.weight.data = layer.v_proj.weight.data.t().contiguous().t()
            return model

        saved(tmp_path, tiny.Net())
        hf_lora.load(transposed(), tmp_path)
        assert "layers.0.v_proj.weight" in refusal(tmp_path, transposed(seed=1))


def test_fingerprints_of_an_older_version_are_compared(tmp_path: Path):
    """16 targeted weights as lists of numbers."""
    saved(tmp_path, tiny.Net())
    tensors, metadata = edit.read_tensors(tmp_path)
    header = json.loads(metadata["hf_lora"])
    samples = {}
    for path in header["slots"]:
        weight = tiny.Net().get_submodule(path).weight.detach().reshape(-1)
        step = weight.numel() // 16
        samples[path] = [float(f"{v:.6g}") for v in weight[::step][:16].tolist()]
    header["fingerprint"] = {"quantized": False, "samples": samples}
    edit.write_tensors(tmp_path, tensors, {"hf_lora": json.dumps(header)})
    hf_lora.load(tiny.Net(), tmp_path)
    model = tiny.Net()
    with torch.no_grad():
        model.head.weight.normal_()  # it does not know of that
    hf_lora.load(model, tmp_path)
    assert refusal(tmp_path, tiny.Net(seed=1)).count("the weights differ") == 4


def test_the_answers_are_those_of_the_right_base(tmp_path: Path):
    saved(tmp_path, llama())
    again = hf_lora.load(llama(), tmp_path)
    twin = llama()
    hf_lora.wrap(twin, targets=["q_proj", "v_proj"], r=2)
    tiny.scramble(twin)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, twin(TOKENS).logits)


def test_another_shape_of_a_target_stays_a_mismatch_of_its_own(tmp_path: Path):
    saved(tmp_path, llama())
    with pytest.raises(AdapterMismatchError, match="the adapter is for in, out"):
        hf_lora.load(llama(hidden_size=64), tmp_path)
