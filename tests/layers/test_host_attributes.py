"""A host's own attributes are its own, also when their names begin as ours do."""

import torch
from torch import nn

import hf_lora


class Scaled(nn.Linear):
    """A linear layer with an attribute of such a name, as diffusers' own linear layers have."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.lora_scale = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.lora_scale


def test_an_attribute_called_like_ours_survives_the_view_and_unwrap():
    model = nn.Sequential(Scaled(4, 6))
    attributes = set(vars(model[0]))
    x = torch.randn(3, 4)
    expected = model(x)

    hf_lora.wrap(model, targets=["0"], r=2)
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].base(x), expected)

    hf_lora.unwrap(model)
    assert torch.equal(model(x), expected)
    assert set(vars(model[0])) == attributes
