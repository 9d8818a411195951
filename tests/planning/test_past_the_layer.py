"""Layers that a model's code reads or calls past the module tree: left out of words, and told."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import HfLoRAWarning
from hf_lora.layers.uncalled import weights_read_by
from tests.tiny import scramble


def look_up(table: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, table.weight)


def only_asks(table: nn.Linear) -> torch.device:
    return table.weight.device


class Passes(nn.Module):
    """Gives its layers to others, which read their weights."""

    def __init__(self):
        super().__init__()
        names = ("called", "by_place", "by_name", "by_method", "by_static", "asked")
        for name in names:
            setattr(self, name, nn.Linear(8, 8, bias=False))

    def method(self, x: torch.Tensor, table: nn.Linear) -> torch.Tensor:
        return x @ table.weight.t()

    @staticmethod
    def static(table: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x @ table.weight.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.asked(self.called(x).to(only_asks(self.asked)))
        x = look_up(self.by_place, look_up(x=x, table=self.by_name))
        return self.static(self.by_static, self.method(x, self.by_method))


def test_a_layer_that_is_given_to_a_function_which_reads_its_weight_is_seen():
    assert weights_read_by(Passes) == {"by_place", "by_name", "by_method", "by_static"}
    plan = hf_lora.plan(Passes(), r=2)
    assert {target.path for target in plan.targets} == {"called", "asked"}
    assert "Passes's own code reads by_name.weight" in plan.left_out["by_name"]


def test_layoutlmv3_looks_positions_up_in_a_linear_layers_weight():
    config = hf.LayoutLMv3Config(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, input_size=32, patch_size=8, coordinate_size=5, shape_size=6,
    )  # fmt: skip
    plan = hf_lora.plan(hf.LayoutLMv3Model(config), r=2)
    reasons = {path: why for path, why in plan.left_out.items() if "rel_pos" in path}
    assert len(reasons) == 3
    assert all("LayoutLMv3Encoder's own code reads" in why for why in reasons.values())


class Kept(nn.Module):
    """Calls its layers from where it keeps them beside the module tree."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
        self.first, self.second = layers
        self.free = nn.Linear(8, 8)
        kept: Any = {"list": layers, "dict": dict(enumerate(layers)), "tuple": tuple(layers)}[how]
        object.__setattr__(self, "kept", kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.kept.values() if isinstance(self.kept, dict) else self.kept:
            x = torch.tanh(layer(x))
        return self.free(x)


@pytest.mark.parametrize("how", ["list", "dict", "tuple"])
def test_a_layer_that_is_called_past_the_tree_is_left_out_so_that_peft_gives_the_same(
    how: str, tmp_path: Path
):
    with pytest.warns(HfLoRAWarning, match="Kept keeps it in a plain attribute as well"):
        model = hf_lora.wrap(Kept(how), r=2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "free.lora_A",
        "free.lora_B",
    }
    scramble(model)
    x = torch.randn(3, 8)
    hf_lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Kept(how), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))


def test_where_it_is_named_it_is_adapted_here_and_the_difference_is_told():
    with pytest.warns(HfLoRAWarning, match="first: Kept keeps it .* PEFT's adapters are not"):
        model = hf_lora.wrap(Kept("list"), ["first"], r=2)
    x = torch.randn(3, 8)
    before = model(x)
    scramble(model)
    wanted = model(x)
    assert not torch.equal(wanted, before)
    torch.testing.assert_close(hf_lora.merge(model)(x), wanted)


def test_maskformers_blocks_of_its_mask_head_are_such():
    config = hf.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, num_attention_heads=4,
        backbone_config=hf.SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            image_size=32, out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        decoder_config=hf.DetrConfig(
            d_model=32, decoder_layers=1, encoder_layers=1, num_queries=4,
            decoder_attention_heads=4, encoder_attention_heads=4, decoder_ffn_dim=48,
            encoder_ffn_dim=48,
        ),
    )  # fmt: skip
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.MaskFormerForInstanceSegmentation(config)
    plan = hf_lora.plan(model, r=2)
    assert "PredictionBlock keeps it" in plan.left_out["mask_embedder.0.0"]


def test_a_model_of_convolutions_says_what_can_be_named():
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    (problem,) = hf_lora.plan(hf.ResNetForImageClassification(config), r=2).problems
    assert "classifier.1 (output head)" in problem
    assert "patterns can name convolution" in problem
