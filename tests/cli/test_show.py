"""``hf-lora show``: an adapter's facts from its files, against the live tensors and PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_lora
from tests.tiny_base import Run

FIELDS = {
    "targets": ["q_proj", "down_proj"],
    "r": 4,
    "alpha": 6,
    "overrides": {"down_proj": {"r": 2, "alpha": 3}},
    "train": ["layers.1.input_layernorm"],
}


def wrapped(base: Path) -> Any:
    """A model with an adapter of which one layer was never trained."""
    torch.manual_seed(1)
    model = hf_lora.wrap(AutoModelForCausalLM.from_pretrained(base), **FIELDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B") and "layers.0.self_attn.q_proj" not in name:
                parameter.normal_()
    return model


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    hf_lora.save(wrapped(base), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_norms_dead_layers_and_sizes(run: Run, adapter: Path, base: Path):
    found = json.loads(run("show", adapter, "--json").stdout)
    model = wrapped(base)
    layers = {layer["path"]: layer for layer in found["layers"]}
    paths = [
        f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert sorted(layers) == sorted(paths)
    for path, layer in layers.items():
        module = model.get_submodule(path)
        # the product itself, in float64, and the rank and strength that this layer was given
        r, alpha = (2, 3) if path.endswith("down_proj") else (4, 6)
        delta = alpha / r * (module.lora_B.double() @ module.lora_A.double()).detach()
        assert layer["norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
        assert (layer["r"], layer["alpha"], layer["scaling"]) == (r, alpha, alpha / r)
        assert (layer["in_features"], layer["out_features"]) == delta.shape[::-1]
        assert layer["bytes"] == 4 * r * sum(delta.shape)
    assert found["dead"] == ["model.layers.0.self_attn.q_proj"]
    assert found["base"] == str(base)
    assert found["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    causes = found["causes"]
    assert sum(causes.values()) == found["file_bytes"] == size
    assert causes["model.layers.1.input_layernorm in full, float32"] == 4 * 32
    assert causes["q_proj, rank 4, float32"] == 4 * 4 * (32 + 32) * 2
    assert found["header"] == {
        "format": 1,
        "fingerprint": {"sampled_tensors": 19, "quantized": False, "vocabulary": 400},
    }
    assert found["config"]["overrides"] == FIELDS["overrides"]


def test_in_words(run: Run, adapter: Path, base: Path):
    text = run("show", adapter).stdout
    for words in (
        "made by hf_lora, format 1",
        f"base: {base} (CAUSAL_LM)",
        "rank 2, 4, alpha 3, 6, scaled by alpha / r",
        "trained in full: model.layers.1.input_layernorm\n",
        "fingerprint of the base: 19 tensors sampled, not quantized",
        "dead: 1 of 4 layers change nothing:\n  - model.layers.0.self_attn.q_proj",
    ):
        assert words in text


def test_neither_the_base_nor_the_product_is_needed(run: Run, tmp_path: Path):
    """A layer whose product would have 2e11 numbers, of a base that nobody has."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["huge"]}
    config["base_model_name_or_path"] = "nobody/has-this"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.huge.lora_{}.weight"
    size = 500_000
    tensors = {key.format("A"): torch.ones(1, size), key.format("B"): torch.ones(size, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = json.loads(run("show", tmp_path, "--json").stdout)
    assert found["layers"][0]["norm"] == pytest.approx(2 * size)
    assert found["base"] == "nobody/has-this"


def test_an_adapter_that_peft_made(run: Run, base: Path, tmp_path: Path):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(tmp_path))
    found = json.loads(run("show", tmp_path, "--json").stdout)
    for layer in found["layers"]:
        module = model.get_submodule(f"base_model.model.{layer['path']}")
        expected = module.get_delta_weight("default").norm()  # type: ignore[operator]
        assert layer["norm"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len(found["layers"]) == 2
    assert (found["header"], found["config"], found["dead"]) == (None, None, [])
    text = run("show", tmp_path).stdout
    assert "not made by hf_lora" in text
    assert "scaled by alpha / sqrt(r)" in text
    assert "fingerprint of the base: none" in text


def test_numbers_that_are_not_finite_are_a_problem(run: Run, base: Path, tmp_path: Path):
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(target_modules=["v_proj"])
    ).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    bad = next(key for key in tensors if key.endswith("layers.1.self_attn.v_proj.lora_B.weight"))
    tensors[bad][0, 0] = float("nan")
    save_file(tensors, file)
    assert bad in run("show", tmp_path, code=1).stdout
    found = json.loads(run("show", tmp_path, "--json", code=1).stdout)
    assert found["not_finite"] == [bad]
    assert [layer["norm"] for layer in found["layers"]] == [0.0, None]


def test_a_named_adapter_is_in_a_folder_of_its_name(run: Run, base: Path, tmp_path: Path):
    model = hf_lora.wrap(AutoModelForCausalLM.from_pretrained(base), "q_proj", adapter="fr")
    hf_lora.save(model, tmp_path)
    assert "fr" in run("show", tmp_path, code=1).stderr
    assert len(json.loads(run("show", tmp_path, "--subfolder", "fr", "--json").stdout)["dead"]) == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 9), "truncated"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model"),
    ],
)
def test_a_damaged_folder_is_refused(run: Run, adapter: Path, spoil: Any, words: str):
    spoil(adapter)
    result = run("show", adapter, code=1)
    assert words in result.stderr
    assert result.stdout == ""


def test_neither_a_folder_nor_an_id(run: Run):
    assert "neither a folder nor a repo id" in run("show", "a/b/c/d", code=1).stderr
    # an id, while the tests are offline
    assert "nobody/nothing" in run("show", "nobody/nothing", code=1).stderr


def test_singular_values_and_how_many_of_them_count(run: Run, adapter: Path, base: Path):
    found = json.loads(run("show", adapter, "--json").stdout)
    model = wrapped(base)
    for layer in found["layers"]:
        module = model.get_submodule(layer["path"])
        delta = module.scaling * (module.lora_B.double() @ module.lora_A.double()).detach()
        values = torch.linalg.svdvals(delta)[: layer["r"]]
        assert layer["values"] == pytest.approx(values.tolist(), rel=1e-6, abs=1e-12)
        shares = values / values.sum() if values.any() else values
        entropy = -float(torch.xlogy(shares, shares).sum())
        wanted = pytest.approx(float(torch.tensor(entropy).exp()), rel=1e-5)
        assert layer["effective_rank"] == (wanted if values.any() else 0)


def test_a_heatmap_is_of_update_over_weight_where_the_base_is_here(
    run: Run, adapter: Path, base: Path, tmp_path: Path
):
    picture = tmp_path / "map.png"
    found = json.loads(run("show", adapter, "--heatmap", picture, "--json").stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(base)
    norms = {layer["path"]: layer["norm"] for layer in found["layers"]}
    assert found["shares"].keys() == norms.keys()
    for path, share in found["shares"].items():
        weight = float(model.state_dict()[f"{path}.weight"].double().norm())
        assert share == pytest.approx(norms[path] / weight, rel=1e-5)


def test_a_heatmap_is_of_the_update_where_it_is_not(run: Run, adapter: Path, tmp_path: Path):
    said = run("show", adapter, "--heatmap", tmp_path / "map.png", "--base", "me/not-here").stdout
    assert "the base is not here" in said
    assert (tmp_path / "map.png").is_file()
