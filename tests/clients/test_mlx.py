"""Files for mlx-lm, loaded by mlx-lm into its own models, against the wrapped model itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config, Phi3ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import hf_lora
from tests.clients.installed import installed
from tests.clients.test_llama_cpp import ADAPTERS, CLOSE, IDS, SIZES, adapted, llama


def qwen3() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False)
    return Qwen3ForCausalLM(config)


def phi3() -> Any:
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0, tie_word_embeddings=False))


BASES = {"llama": llama, "qwen3": qwen3, "phi3": phi3}


def in_mlx(model: Any, folder: Path | None = None) -> torch.Tensor:
    """Return the logits of mlx-lm's model with the same weights, and an adapter if one is named."""
    mx, models, utils = (installed(n) for n in ("mlx.core", "mlx_lm.utils", "mlx_lm.tuner.utils"))
    fields = model.config.to_dict()
    # mlx-lm 0.32 does not know transformers' rope_parameters
    rope = fields["rope_parameters"]
    fields.setdefault("rope_theta", rope.get("full_attention", rope)["rope_theta"])
    kind, arguments = models._get_classes(fields)
    made = kind(arguments.from_dict(fields))
    weights = {
        name: mx.array(tensor.detach().numpy())
        for name, tensor in model.state_dict().items()
        if ".lora" not in name and not (name == "lm_head.weight" and fields["tie_word_embeddings"])
    }
    weights = made.sanitize(weights) if hasattr(made, "sanitize") else weights
    made.load_weights(list(weights.items()))
    if folder is not None:
        utils.load_adapters(made, str(folder))
    made.eval()
    return torch.from_numpy(np.array(made(mx.array([IDS]))[0]))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *(("llama", fields) for fields in ADAPTERS.values()),
        ("qwen3", ADAPTERS["with overrides"]),
        # q, k and v are one layer in it
        ("phi3", ADAPTERS["rank-stabilized"]),
    ],
)
def test_mlx_computes_what_the_wrapped_model_does(
    tmp_path: Path, name: str, fields: dict[str, Any]
):
    model = BASES[name]()
    model.save_pretrained(tmp_path / "base")
    plain, there = logits(model), in_mlx(model)
    wanted = logits(adapted(model, tmp_path / "adapter", **fields))
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "mlx", base=tmp_path / "base")
    found = in_mlx(model, tmp_path / "out")
    assert (wanted - plain).abs().max() > 1000 * CLOSE
    assert (there - plain).abs().max() < CLOSE
    assert (found - wanted).abs().max() < CLOSE


def test_untied_ends_too(tmp_path: Path):
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    both = {"targets": ["lm_head", "embed_tokens", "up_proj"], "r": 4, "alpha": 8}
    wanted = logits(adapted(model, tmp_path / "adapter", **both))
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "mlx", base=tmp_path / "base")
    assert (in_mlx(model, tmp_path / "out") - wanted).abs().max() < CLOSE


def test_one_rank_one_scale_and_the_blocks_that_it_needs(tmp_path: Path):
    model = llama(num_hidden_layers=4)
    model.save_pretrained(tmp_path / "base")
    fields = {"r": 4, "alpha": 8, "overrides": {"v_proj": {"r": 2, "alpha": 1}}}
    adapted(model, tmp_path / "adapter", targets=[r"layers\.[23]\..*(q|v)_proj"], **fields)
    hf_lora.export(
        tmp_path / "adapter", tmp_path / "out", "mlx", base=tmp_path / "base", dtype="bfloat16"
    )
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    assert said["lora_parameters"] == {"dropout": 0.0, "keys": keys, "rank": 4, "scale": 0.5}
    assert (said["fine_tune_type"], said["num_layers"]) == ("lora", 2)
    held = load_file(tmp_path / "out" / "adapters.safetensors")
    assert len(held) == 8
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    name = "model.layers.2.self_attn.v_proj.lora_"
    assert (held[f"{name}a"].shape, held[f"{name}b"].shape) == ((32, 4), (4, 16))
    assert not held[f"{name}b"][2:].any()


def test_everything_that_mlx_cannot_do_is_named_at_once(tmp_path: Path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    fields = {"targets": ["q_proj", "embed_tokens"], "train": ["norm"]}
    adapted(model, tmp_path / "adapter", r=2, alpha=4, **fields)
    with pytest.raises(hf_lora.UnsupportedAdapterError) as caught:
        hf_lora.export(tmp_path / "adapter", tmp_path / "out", "mlx", base=tmp_path / "base")
    for words in ("modules trained in full, here norm", "tied", "merge_checkpoint"):
        assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
