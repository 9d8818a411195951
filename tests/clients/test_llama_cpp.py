"""GGUF adapters, run by llama.cpp, against the wrapped model itself."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import hf_lora
from tests.clients.gguf_base import MANY, told, write_base
from tests.tiny_base import tiny_model

CLOSE = 1e-4
"""Far above what two orders of sums in float32 differ by, far below what an adapter does."""

IDS = [5, 17, 30, 44, 99, 3]
SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
OVERRIDES = {"down_proj": {"r": 2, "alpha": 3}, r"layers\.0\..*q_proj": {"r": 6, "alpha": 40}}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"targets": ["q_proj", "v_proj"], "r": 4, "alpha": 8},
    "rank-stabilized": {"targets": "all-linear", "r": 4, "alpha": 6, "rslora": True},
    "with overrides": {"targets": "all-linear", "r": 4, "alpha": 8, "overrides": OVERRIDES},
    "one layer": {"targets": [r"layers\.1\.self_attn\.k_proj"], "r": 3, "alpha": 5},
}


def qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def llama(**fields: Any) -> Any:
    return tiny_model(**{**SIZES, **fields})


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 120}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2))


BASES = {"llama": llama, "qwen2": qwen2}


def adapted(model: Any, folder: Path, seed: int = 1, **fields: Any) -> Any:
    """Wrap a model, give its adapter numbers, save it, and return the model."""
    torch.manual_seed(seed)
    wrapped = hf_lora.wrap(model, **fields)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    hf_lora.save(wrapped, folder)
    return wrapped


def log_probabilities(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


def furthest(found: dict[int, float], wanted: torch.Tensor) -> float:
    assert len(found) == MANY
    return max(abs(value - float(wanted[word])) for word, value in found.items())


def compare(tmp_path: Path, model: Any, name: str, close: float = CLOSE, **fields: Any) -> None:
    """Check that llama.cpp with the adapter computes what the wrapped model does."""
    model.save_pretrained(tmp_path / "base")
    write_base(model, tmp_path / "base.gguf", name)
    plain = log_probabilities(model)
    wanted = log_probabilities(adapted(model, tmp_path / "adapter", **fields))
    assert furthest(told(tmp_path / "base.gguf", IDS), plain) < close
    assert (wanted - plain).abs().max() > 1000 * CLOSE
    out = tmp_path / "out"
    hf_lora.export(tmp_path / "adapter", out, "llama.cpp", base=tmp_path / "base")
    found = told(tmp_path / "base.gguf", IDS, out / "adapter.gguf")
    assert furthest(found, wanted) < close


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *(("llama", fields) for fields in ADAPTERS.values()),
        ("qwen2", ADAPTERS["rank-stabilized"]),
        ("qwen2", ADAPTERS["with overrides"]),
    ],
)
def test_llama_cpp_computes_what_the_wrapped_model_does(
    tmp_path: Path, name: str, fields: dict[str, Any]
):
    compare(tmp_path, BASES[name](), name, **fields)


def test_an_untied_head_and_a_transposed_weight_too(tmp_path: Path):
    both = {"targets": ["lm_head", "q_proj"], "r": 4, "alpha": 8}
    compare(tmp_path / "a", llama(tie_word_embeddings=False), "llama", **both)
    # GPT-2's Conv1D, whose factors llama.cpp's own converter exchanges
    fields = {"targets": ["c_attn", "c_fc", r"attn\.c_proj"], "r": 4, "alpha": 8}
    # its GELU is a table of 16-bit numbers there
    compare(tmp_path / "b", gpt2(), "gpt2", close=20 * CLOSE, **fields)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A base's folder and that of an adapter with two scales."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "adapter", **ADAPTERS["with overrides"])
    return tmp_path / "base", tmp_path / "adapter"


def tensors_of(path: Path) -> dict[str, Any]:
    return {each.name: each for each in gguf.GGUFReader(path).tensors}


def test_what_the_file_says_of_itself(saved: tuple[Path, Path], tmp_path: Path):
    base, adapter = saved
    done = hf_lora.export(adapter, tmp_path / "out", "llama.cpp", base=base)
    assert done.files == ("Modelfile", "adapter.gguf")
    assert "Scales other than 8 / r are in B of model.layers.0.mlp.down_proj" in str(done)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    assert said["adapter.lora.alpha"] == 8.0
    held = tensors_of(tmp_path / "out" / "adapter.gguf")
    assert len(held) == 28
    assert list(held["blk.0.ffn_down.weight.lora_a"].shape) == [64, 2]
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_type_holds_the_numbers_rounded_once(
    saved: tuple[Path, Path], tmp_path: Path, dtype: str
):
    base, adapter = saved
    hf_lora.export(adapter, tmp_path / "out", "llama.cpp", base=base, dtype=dtype)
    hf_lora.export(adapter, tmp_path / "wide", "llama.cpp", base=base)
    wide = tensors_of(tmp_path / "wide" / "adapter.gguf")
    for name, each in tensors_of(tmp_path / "out" / "adapter.gguf").items():
        to = getattr(torch, dtype)
        wanted = torch.from_numpy(wide[name].data.copy()).to(to).view(torch.uint8)
        assert torch.equal(torch.from_numpy(each.data.copy()).view(torch.uint8), wanted), name


def test_the_number_of_heads_is_asked_for(saved: tuple[Path, Path], tmp_path: Path):
    base, adapter = saved
    gone = base.rename(tmp_path / "moved")
    with pytest.raises(hf_lora.UnsupportedAdapterError, match="name its base with base="):
        hf_lora.export(adapter, tmp_path / "out", "llama.cpp")
    assert not (tmp_path / "out").exists()
    assert hf_lora.export(adapter, tmp_path / "out", "llama.cpp", base=gone)


def test_everything_that_llama_cpp_cannot_do_is_named_at_once(tmp_path: Path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    fields = {"targets": ["q_proj", "embed_tokens"], "train": ["norm"]}
    adapted(model, tmp_path / "adapter", r=2, alpha=4, **fields)
    with pytest.raises(hf_lora.UnsupportedAdapterError) as caught:
        hf_lora.export(tmp_path / "adapter", tmp_path / "out", "llama.cpp")
    for words in (
        "linear layers only",
        "trained in full, here norm",
        "convert_hf_to",
        "merged=True",
    ):
        assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


CONVERTER = """
import pathlib, sys
from safetensors import safe_open
merged, _, out, _, kind = sys.argv[1:]
if kind == "f16":
    sys.exit("this model is not supported")
with safe_open(pathlib.Path(merged) / "model.safetensors", "pt") as file:
    found = float(file.get_tensor("model.layers.0.self_attn.q_proj.weight").sum())
pathlib.Path(out).write_text(f"{kind} {found}")
"""


def test_a_merged_model_goes_through_llama_cpps_own_converter(
    saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stand-in for it, which is no package: what it is given and what comes of it."""
    base, adapter = saved
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(CONVERTER)
    how: dict[str, Any] = {"base": base, "merged": True, "converter": tmp_path / "llama.cpp"}
    done = hf_lora.export(adapter, tmp_path / "out", "llama.cpp", **how)
    assert done.files == ("Modelfile", "model.gguf")
    assert "FROM ./model.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    model = hf_lora.load(llama(), adapter)
    with torch.no_grad():
        weight = hf_lora.merge_and_unwrap(model).model.layers[0].self_attn.q_proj.weight.sum()
    kind, found = (tmp_path / "out" / "model.gguf").read_text().split()
    assert (kind, float(found)) == ("auto", pytest.approx(float(weight), rel=1e-4))
    with pytest.raises(hf_lora.SaveError, match="exit code 1:\n  this model is not supported"):
        hf_lora.export(adapter, tmp_path / "two", "llama.cpp", dtype="float16", **how)
    monkeypatch.setenv("PATH", "")
    for where, words in ((None, "is not on the PATH. Get it with"), (base, "There is no")):
        with pytest.raises(hf_lora.ConfigError, match=words):
            hf_lora.export(adapter, tmp_path / "two", "llama.cpp", merged=True, converter=where)
    with pytest.raises(hf_lora.ConfigError, match=r"merged=True is for llama\.cpp; for mlx"):
        hf_lora.export(adapter, tmp_path / "two", "mlx", merged=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter", "base", "llama.cpp", "out",
    ]  # fmt: skip
