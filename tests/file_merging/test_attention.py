"""An attention whose weights are read is merged from file to file as it is in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import hf_lora


def test_a_pooling_head_is_what_it_is_in_memory(tmp_path: Path):
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = SiglipVisionModel.from_pretrained(tmp_path / "base")
    hf_lora.wrap(model, ["q_proj", r"head\.attention"], r=2, bias="all")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    hf_lora.save(model, tmp_path / "adapter")
    hf_lora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = SiglipVisionModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        wanted = model.eval()(pixels).pooler_output
        torch.testing.assert_close(merged(pixels).pooler_output, wanted, rtol=1e-4, atol=1e-5)
    own = dict(merged.named_parameters())
    hf_lora.merge(model)
    for name, parameter in model.named_parameters():
        if name in own and "lora" not in name:
            torch.testing.assert_close(own[name], parameter, rtol=1e-6, atol=1e-7)
