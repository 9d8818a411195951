"""A host's own attributes are its own, also when their names are or begin as ours."""

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


class Worded(nn.Linear):
    """A linear layer that uses every word of ours, each kept in another way."""

    r = 7  # on the class

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.scaling = 0.25
        self.alpha = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("factor", torch.tensor(2.0))
        self.base = nn.Identity()

    @property
    def doubled(self) -> float:
        return 2 * self.scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(super().forward(x)) * self.scaling * self.alpha * self.factor * self.r


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


def test_a_hosts_words_are_read_and_set_as_its_own():
    model = nn.Sequential(Worded(4, 6))
    x = torch.randn(3, 4)
    expected = model(x)

    hf_lora.wrap(model, targets=["0"], r=2, alpha=64.0)
    layer = model[0]
    assert torch.equal(layer(x), expected)
    assert (layer.r, layer.scaling, layer.doubled) == (7, 0.25, 0.5)
    assert isinstance(layer.alpha, nn.Parameter)
    assert isinstance(layer.base, nn.Identity)

    layer.scaling = 0.5
    assert torch.allclose(layer(x), 2 * expected)
    del layer.scaling
    assert layer.scaling == 32.0  # ours again: alpha / r
    nn.init.normal_(layer.lora_B)
    layer.__dict__["scaling"] = 0.25
    assert not torch.allclose(layer(x), expected)

    hf_lora.unwrap(model)
    assert torch.equal(model(x), expected)


def test_without_a_host_that_has_them_the_words_are_the_adapters():
    model = nn.Sequential(nn.Linear(4, 6))
    hf_lora.wrap(model, targets="0", r=2, alpha=6.0)
    hf_lora.add_adapter(model, "fr", "0", r=3, alpha=3.0)
    layer = model[0]
    assert (layer.r, layer.alpha, layer.scaling) == (2, 6.0, 3.0)
    hf_lora.activate(model, "fr")
    assert (layer.r, layer.alpha, layer.scaling) == (3, 3.0, 1.0)
    hf_lora.activate(model, [])
    assert layer.r == 2


def test_the_adapters_words_cannot_be_set_without_effect():
    model = nn.Sequential(nn.Linear(4, 6))
    hf_lora.wrap(model, targets="0", r=2)
    for name in ("r", "alpha", "scaling", "base"):
        before = getattr(model[0], name)
        try:
            setattr(model[0], name, 1)
        except AttributeError as error:
            assert "configuration" in str(error)  # noqa: PT017
        else:
            raise AssertionError(f"{name} was set")
        if name != "base":
            assert getattr(model[0], name) == before
