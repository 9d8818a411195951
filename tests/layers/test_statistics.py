"""Normalizations of a frozen base: they use the statistics that they have and do not move them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import StateError
from tests.snapshot import base_digests, snapshot
from tests.tiny import scramble

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """A layer to adapt on each side of a normalization, whose statistics say something."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.fc, self.top = nn.Linear(6, 6), nn.Sequential(make(), nn.Linear(6, 3))
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.running_var.uniform_(1, 3)

    @property
    def norm(self) -> nn.Module:
        return self.top[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.fc(x))


class WithActivation(nn.BatchNorm1d):
    """Has a forward of its own that asks for its mode, as timm's normalizations have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        statistics = self.running_mean, self.running_var
        y = nn.functional.batch_norm(x, *statistics, self.weight, self.bias, self.training)
        return torch.relu(y)


class Sealed(nn.BatchNorm1d):
    """Forbids subclasses."""

    def __init_subclass__(cls, **kwargs: object):
        raise TypeError("Sealed cannot be subclassed")


MOVING: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "without scale and shift": lambda: nn.BatchNorm1d(6, affine=False),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
    "WithActivation": lambda: WithActivation(6),
}
ON_GPUS = {"SyncBatchNorm": lambda: nn.SyncBatchNorm(6)}  # which takes batches there alone
NORMS = MOVING | ON_GPUS


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return those of one step, in the order of the layers."""
    model.zero_grad()
    model(X).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", NORMS.values(), ids=list(NORMS))
def test_a_frozen_normalization_trains_as_it_answers(make: Callable[[], nn.Module], tmp_path: Path):
    """The oracle is PEFT with every normalization in eval mode, which it leaves to its users."""
    model = Normed(make).train()
    before, twin = snapshot(model), copy.deepcopy(model).eval()
    hf_lora.wrap(model, targets=["fc", r"top\.1"], r=2)
    assert torch.equal(model(X), twin(X))
    scramble(model)
    hf_lora.save(model, tmp_path)
    peer = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True).eval()
    for ours, theirs in zip(gradients(model), gradients(peer), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with hf_lora.no_adapter(model):
        model(X)
    hf_lora.unwrap(model)
    assert snapshot(model) == before
    if make not in ON_GPUS.values():
        model(X)
        assert snapshot(model).buffers != before.buffers  # nothing of ours is left


@pytest.mark.parametrize("make", MOVING.values(), ids=list(MOVING))
def test_one_that_an_adapter_trains_moves_that_ones_statistics_and_no_others(
    make: Callable[[], nn.Module],
):
    model = Normed(make).train()
    twin, base = copy.deepcopy(model), base_digests(model)
    hf_lora.wrap(model, targets="fc", r=2, train=["top"])
    hf_lora.add_adapter(model, "b", targets="fc", r=2)
    assert torch.equal(model(X), twin(X))
    for elsewhere in (hf_lora.no_adapter(model), hf_lora.use_adapter(model, "b")):
        with elsewhere:
            model(X)
    hf_lora.freeze(model, "default")
    model(X)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model.norm, name), getattr(twin.norm, name))
    hf_lora.unfreeze(model, "default")
    assert torch.equal(model(X), twin(X))
    hf_lora.activate(model, "b")
    hf_lora.delete_adapter(model, "default")  # it is a frozen one again
    model(X)
    hf_lora.unwrap(model)
    assert base_digests(model) == base


def test_an_adapter_that_was_loaded_without_training_moves_nothing(tmp_path: Path):
    model = Normed(MOVING["without scale and shift"]).train()
    twin = copy.deepcopy(model)
    hf_lora.wrap(model, targets="fc", r=2, train=["top"])
    model(X)
    hf_lora.save(model, tmp_path)
    mean = model.norm.running_mean.clone()
    for trainable in (False, True):
        loaded = hf_lora.load(copy.deepcopy(twin), tmp_path, trainable=trainable).train()
        loaded(X)
        assert torch.equal(loaded.norm.running_mean, mean) is not trainable


def test_one_that_somebody_unfreezes_moves_as_it_trains():
    model = hf_lora.wrap(Normed(MOVING["BatchNorm1d"]), targets="fc", r=2).train()
    model(X)
    assert not model.norm.num_batches_tracked
    model.norm.weight.requires_grad_(True)
    model(X)
    assert model.norm.num_batches_tracked == 1


def test_the_mode_that_was_set_is_kept():
    model = Normed(MOVING["BatchNorm1d"]).eval()
    hf_lora.wrap(model, targets="fc", r=2)
    assert not model.train().norm.training
    hf_lora.unwrap(model)
    assert model.norm.training


def test_copies_are_frozen_too_and_views_are_plain():
    model = hf_lora.wrap(Normed(MOVING["BatchNorm1d"]), targets="fc", r=2).train()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(X)
        assert not twin.norm.num_batches_tracked
        hf_lora.unwrap(twin)
        assert type(twin.norm) is nn.BatchNorm1d
    assert type(hf_lora.base_view(model).norm) is nn.BatchNorm1d


def test_layers_run_again_by_checkpointing_do_what_they_did():
    model = hf_lora.wrap(Normed(MOVING["BatchNorm1d"]), targets=["fc", r"top\.1"], r=2).train()
    scramble(model)
    expected = gradients(model)
    inner = model.forward
    model.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
    for ours, plain in zip(gradients(model), expected, strict=True):
        assert torch.equal(ours, plain)
    assert not model.norm.num_batches_tracked


def test_it_compiles_to_one_graph():
    model = hf_lora.wrap(
        Normed(MOVING["BatchNorm1d"]), targets="fc", r=2, train=[r"top\.1"]
    ).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
    assert not model.norm.num_batches_tracked


def test_after_an_error_the_normalization_is_what_it_was():
    model = nn.Sequential(Normed(MOVING["BatchNorm1d"]), Normed(lambda: Sealed(6)))
    before = snapshot(model)
    with pytest.raises(hf_lora.TargetError):
        hf_lora.wrap(model, targets="fc", r=2, train=["0.top", "1.top"])
    assert snapshot(model) == before


def test_converting_it_afterwards_is_refused():
    model = hf_lora.wrap(Normed(MOVING["BatchNorm1d"]), targets="fc", r=2)
    with pytest.raises(StateError, match="0 of this Sequential is a normalization of a frozen"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_the_plan_names_them():
    model = nn.Sequential(*(Normed(make) for make in MOVING.values()), nn.BatchNorm1d(3))
    plan = hf_lora.plan(model, targets="fc", r=2, train=[r"0\.top", "5"])
    assert plan.frozen_norms == tuple(f"{i}.top.0" for i in (1, 2, 3, 4))
    line = "running statistics that are used and do not move: 1.top.0 and 3 more"
    assert line in str(plan).splitlines()
    assert not hf_lora.plan(nn.Sequential(nn.Linear(6, 6)), targets="0", r=2).frozen_norms


def conformer() -> nn.Module:
    return hf.Wav2Vec2ConformerForSequenceClassification(
        hf.Wav2Vec2ConformerConfig(
            vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
            classifier_proj_size=8, conv_depthwise_kernel_size=3, layerdrop=0.0,
            mask_time_prob=0.0,
        )
    )  # fmt: skip


def mobilevit() -> nn.Module:
    return hf.MobileViTForImageClassification(
        hf.MobileViTConfig(
            image_size=32, patch_size=2, hidden_sizes=[16, 16, 16], num_attention_heads=2,
            neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16],
        )
    )  # fmt: skip


def levit() -> nn.Module:
    return hf.LevitForImageClassification(
        hf.LevitConfig(
            image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2],
            key_dim=[4, 4, 4], depths=[1, 1, 1],
        )
    )  # fmt: skip


def resnet() -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    )


@pytest.mark.parametrize(
    ("build", "shape", "targets"),
    [
        (conformer, (2, 400), "all-linear"),
        (mobilevit, (2, 3, 32, 32), "all-linear"),
        (levit, (2, 3, 32, 32), "all-linear"),
        (resnet, (2, 3, 32, 32), r"classifier\.1"),
    ],
    ids=["Wav2Vec2-Conformer", "MobileViT", "LeViT", "ResNet"],
)
def test_a_step_of_training_leaves_the_statistics_of_real_models(
    build: Callable[[], nn.Module], shape: tuple[int, ...], targets: str
):
    model = build().train()
    moving = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    before = snapshot(model)
    hf_lora.wrap(model, targets=targets, r=1, train=())
    assert hf_lora.plan(model, targets=targets, r=1, train=()).frozen_norms == tuple(moving)
    assert moving
    trains = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        model(torch.randn(shape)).logits.square().sum().backward()
        torch.optim.SGD(trains, lr=0.1).step()
    hf_lora.unwrap(model)
    after = snapshot(model)
    assert (after.modules, after.buffers) == (before.modules, before.buffers)
    assert after.parameters == before.parameters
