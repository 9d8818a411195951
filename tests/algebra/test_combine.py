"""Sums of adapters against dense sums in float64, for every kind of layer and every flag."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from hf_lora.files.read import read_folder
from tests.algebra.zoo import EVERY, Zoo, deltas, saved, total
from tests.kinds import expert_models


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], far: float = 1e-6):
    assert {n for n, d in found.items() if d.any()} == {n for n, d in wanted.items() if d.any()}
    for name, delta in found.items():
        if name in wanted:
            torch.testing.assert_close(delta, wanted[name], rtol=far, atol=far, msg=name)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    file = read_folder(folder).file
    return dict(file.read(list(file.shapes)))


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "biases on B": {"targets": ["linear", "turned", "conv", "grouped"], "lora_bias": True},
    "own biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "overrides": {"overrides": {"linear": {"r": 4, "alpha": 7}, "conv": {"alpha": 1.5}}},
    "a module in full": {"train": ["head"]},
    "rows": {"targets": ["linear"], "train_rows": {"embed": [3, 5]}},
    "only rows": {"targets": (), "train_rows": {"embed": [3, 5]}},
    "dropout": {"targets": ["linear", "conv"], "dropout": 0.25},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_one_adapter_at_weight_1_is_that_adapter(tmp_path: Path, flags: dict[str, Any]):
    folder = saved(tmp_path / "a", 1, **flags)
    made = hf_lora.combine([folder])
    made.save(tmp_path / "out")
    before, after = read_folder(folder), read_folder(tmp_path / "out")
    assert before.slots == after.slots
    assert before.fields == after.fields
    assert before.config == after.config
    assert before.header == after.header
    there, here = tensors_of(folder), tensors_of(tmp_path / "out")
    assert there.keys() == here.keys()
    assert all(torch.equal(there[key], here[key]) for key in there)
    assert made.error.total == 0


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3), (2.0, 0.0)])
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_a_sum_is_the_dense_sum_for_every_kind_of_layer(
    tmp_path: Path, method: str, weights: tuple[float, float]
):
    one = saved(tmp_path / "a", 1, overrides={"linear": {"r": 3, "alpha": 5}})
    other = saved(tmp_path / "b", 2, r=4, alpha=9.0, rslora=True)
    made = hf_lora.combine([one, other], weights, method)
    made.save(tmp_path / "out")
    wanted = total([(w, deltas(f)) for w, f in zip(weights, (one, other), strict=True)])
    assert_same(deltas(tmp_path / "out"), wanted)
    assert made.error.total < 1e-6


def test_what_one_adapter_lacks_counts_as_zero(tmp_path: Path):
    one = saved(tmp_path / "a", 1, targets=["linear", "attn"])
    other = saved(tmp_path / "b", 2, targets=["conv", "linear", "grouped"], r=4)
    made = hf_lora.combine({one: 0.5, other: 0.5})
    made.save(tmp_path / "out")
    assert_same(deltas(tmp_path / "out"), total([(0.5, deltas(one)), (0.5, deltas(other))]))
    assert made.layers["linear"].r == 6
    assert made.layers["conv"].r == 4


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize(
    "make", [expert_models.qwen3_moe, expert_models.gpt_oss, expert_models.llama4]
)
def test_stacked_experts_are_added_up_expert_by_expert(tmp_path: Path, make: Any, method: str):
    def built() -> Any:
        torch.manual_seed(0)
        return make()

    both = saved(tmp_path / "a", 1, expert_models.PARTS, built, r=2)
    down = saved(tmp_path / "b", 2, expert_models.PARTS[1:], built, r=3, alpha=4.0)
    made = hf_lora.combine([both, down], [1, -0.5], method)
    made.save(tmp_path / "out")
    wanted = total([(1.0, deltas(both, built)), (-0.5, deltas(down, built))])
    assert_same(deltas(tmp_path / "out", built), wanted)


def test_biases_on_b_are_added_up_as_updates_are(tmp_path: Path):
    one = saved(tmp_path / "a", 1, targets=["linear", "conv"], lora_bias=True)
    other = saved(tmp_path / "b", 2, targets=["linear", "turned"], r=3)
    made = hf_lora.combine([one, other], [2, 1])
    made.save(tmp_path / "out")
    assert_same(deltas(tmp_path / "out"), total([(2.0, deltas(one)), (1.0, deltas(other))]))


def dense(found: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    """Return the nearest matrix of a rank, and how far away it is."""
    u, s, v = torch.linalg.svd(found.flatten(1), full_matrices=False)
    near = (u[:, :rank] * s[:rank]) @ v[:rank]
    return near.view_as(found), float(s[rank:].norm() / s.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lower_rank_is_the_nearest_and_its_error_is_exact(tmp_path: Path, dtype: torch.dtype):
    names = ["linear", "turned", "conv", "embed"]
    folders = [saved(tmp_path / str(i), i, names, r=3, dtype="float32") for i in range(3)]
    made = hf_lora.combine(folders, rank=4, dtype=dtype)
    made.save(tmp_path / "out")
    wanted = total([(1.0, deltas(folder)) for folder in folders])
    found = deltas(tmp_path / "out")
    off = norm = 0.0
    for path in names:
        name = f"{path}.weight"
        near, best = dense(wanted[name], 4)
        assert made.layers[path].r == 4
        lost = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        assert made.error.layers[path] == pytest.approx(
            lost, rel=2e-3 if dtype == torch.bfloat16 else 1e-6
        )
        if dtype == torch.float32:
            torch.testing.assert_close(found[name], near, rtol=1e-5, atol=1e-5)
            assert lost == pytest.approx(best, rel=1e-6)
        off += float((found[name] - wanted[name]).norm() ** 2)
        norm += float(wanted[name].norm() ** 2)
    assert made.error.total == pytest.approx((off / norm) ** 0.5, rel=2e-3)


def test_energy_gives_the_lowest_rank_that_keeps_it(tmp_path: Path):
    folder = saved(tmp_path / "a", 1, ["linear", "turned", "conv"], r=5)
    made = hf_lora.resize(folder, energy=0.9)
    whole = deltas(folder)
    for path, slot in made.layers.items():
        squares = torch.linalg.svdvals(whole[f"{path}.weight"].flatten(1)).square()
        kept = squares.cumsum(0) / squares.sum()
        assert slot.r == int((kept < 0.9).sum()) + 1
        assert made.energy[path] == pytest.approx(float(kept[slot.r - 1]), rel=1e-5)
    made.save(tmp_path / "out")
    hf_lora.load(Zoo(), tmp_path / "out")


def test_a_rank_that_is_no_lower_changes_nothing(tmp_path: Path):
    folder = saved(tmp_path / "a", 1)
    hf_lora.resize(folder, rank=2).save(tmp_path / "out")
    there, here = tensors_of(folder), tensors_of(tmp_path / "out")
    assert all(torch.equal(there[key], here[key]) for key in there)


def test_an_adapter_minus_itself_is_nothing(tmp_path: Path):
    folder = saved(tmp_path / "a", 1, rslora=True)
    hf_lora.subtract(folder, folder).save(tmp_path / "cat")
    made = hf_lora.subtract(folder, folder, rank=1)
    made.save(tmp_path / "svd")
    for name in ("cat", "svd"):
        assert all(float(d.abs().max()) < 1e-6 for d in deltas(tmp_path / name).values())


def test_a_difference_gives_back_what_was_added(tmp_path: Path):
    one, other = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, r=4)
    hf_lora.combine([one, other]).save(tmp_path / "both")
    made = hf_lora.subtract(tmp_path / "both", other, rank=2)
    made.save(tmp_path / "back")
    assert_same(deltas(tmp_path / "back"), deltas(one), 1e-5)
    assert made.error.total < 1e-6


def test_more_ranks_than_a_layer_has_are_put_into_as_many_as_it_has(tmp_path: Path):
    folders = [saved(tmp_path / str(i), i, ["linear", "turned"], r=4) for i in range(3)]
    made = hf_lora.combine(folders)
    made.save(tmp_path / "out")
    assert made.layers["linear"].r == 6
    assert_same(deltas(tmp_path / "out"), total([(1.0, deltas(f)) for f in folders]), 1e-5)


def test_adapters_of_a_model_go_by_their_names(tmp_path: Path):
    model = Zoo()
    for seed, name in enumerate(("fr", "de")):
        folder = saved(tmp_path / name, seed, EVERY)
        hf_lora.load(model, folder, adapter=name)
    made = hf_lora.combine({"fr": 0.25, "de": 0.75}, model=model)
    made.save(tmp_path / "named")
    hf_lora.combine([tmp_path / "fr", tmp_path / "de"], [0.25, 0.75]).save(tmp_path / "folders")
    there, here = tensors_of(tmp_path / "folders"), tensors_of(tmp_path / "named")
    assert all(torch.equal(there[key], here[key]) for key in there)


def test_the_type_is_the_widest_of_the_adapters_unless_another_is_asked_for(tmp_path: Path):
    one, other = saved(tmp_path / "a", 1), tmp_path / "b"
    hf_lora.combine([one], dtype="bfloat16").save(other)
    assert {t.dtype for t in tensors_of(other).values()} == {torch.bfloat16}
    assert hf_lora.combine([one], dtype="bfloat16").error.total > 1e-4
    both = hf_lora.combine([one, other])
    assert {t.dtype for t in both.data.tensors.values()} == {torch.float32}


def test_peft_reads_what_was_combined(tmp_path: Path):
    peft = pytest.importorskip("peft")
    names = ["linear", "turned", "conv", "embed"]
    one = saved(tmp_path / "a", 1, names, overrides={"conv": {"r": 4}})
    other = saved(tmp_path / "b", 2, ["linear", "conv"], r=3, rslora=True)
    hf_lora.combine([one, other], [1, -2]).save(tmp_path / "out")
    wanted = deltas(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(Zoo().double(), tmp_path / "out")
    for path in names:
        layer = model.base_model.model.get_submodule(path)
        delta = layer.get_delta_weight("default")
        torch.testing.assert_close(delta.double(), wanted[f"{path}.weight"], rtol=1e-5, atol=1e-5)


def test_it_equals_pefts_sum_where_that_is_right(tmp_path: Path):
    peft = pytest.importorskip("peft")
    folders = {n: saved(tmp_path / n, i, ["linear", "turned"], r=3) for i, n in enumerate("ab")}
    model = peft.PeftModel.from_pretrained(Zoo(), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], "b")
    for method, rank in (("cat", None), ("svd", 3)):
        model.add_weighted_adapter(["a", "b"], [0.6, 0.4], method, method, svd_rank=rank)
        made = hf_lora.combine([*folders.values()], [0.6, 0.4], method, rank)
        made.save(tmp_path / method)
        found = deltas(tmp_path / method)
        for path in ("linear", "turned"):
            delta = model.base_model.model.get_submodule(path).get_delta_weight(method)
            torch.testing.assert_close(found[f"{path}.weight"].float(), delta, rtol=1e-4, atol=1e-5)
