"""Models that see: ViT, DINOv2, CLIP and SigLIP, from a plan to the base again."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.families.walk import Family, walk

IMAGE, PATCH, CLASSES, WORDS = 16, 8, 4, 48
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEES = {**SIZES, "image_size": IMAGE, "patch_size": PATCH, "num_channels": 3}
READS = {
    **SIZES,
    "vocab_size": WORDS,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE, IMAGE, generator=generator)


def texts(count: int = 2) -> torch.Tensor:
    ids = torch.randint(3, WORDS, (count, 7), generator=torch.Generator().manual_seed(2))
    ids[:, -1] = 2  # CLIP pools where the text ends
    return ids


def labelled() -> list[dict[str, Any]]:
    return [{"pixel_values": x, "labels": n % CLASSES} for n, x in enumerate(images(8))]


def pairs() -> list[dict[str, Any]]:
    both = zip(images(8), texts(8), strict=True)
    return [{"pixel_values": x, "input_ids": ids} for x, ids in both]


def with_loss(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put rows together; CLIP's and SigLIP's losses are of all pairs of a batch, if asked for."""
    return {**hf.default_data_collator(rows), "return_loss": True}


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**SEES, num_labels=CLASSES))


def dinov2() -> Any:
    config = hf.Dinov2Config(**SEES, num_labels=CLASSES, mlp_ratio=2)
    return hf.Dinov2ForImageClassification(config)


def clip() -> Any:
    return hf.CLIPModel(hf.CLIPConfig(text_config=READS, vision_config=SEES, projection_dim=16))


def siglip() -> Any:
    return hf.SiglipModel(hf.SiglipConfig(text_config=READS, vision_config=SEES))


def seen() -> dict[str, Any]:
    return {"pixel_values": images()}


def both() -> dict[str, Any]:
    return {"pixel_values": images(), "input_ids": texts()}


CLASSIFIES = {"inputs": seen, "answer": "logits", "rows": labelled, "trainer": hf.Trainer}
PAIRS = {
    "inputs": both,
    "answer": "logits_per_image",
    "rows": pairs,
    "trainer": hf.Trainer,
    "options": {"data_collator": with_loss},
}
HEAD = {"adapts": 12, "left_out": ("classifier",)}
POOLED = "vision_model.head.attention.out_proj"
PATCHES = "patch_embeddings.projection"
FAMILIES = [
    Family("vit", vit, **CLASSIFIES, **HEAD),
    Family("vit, its patches", vit, **CLASSIFIES, targets=["attention", PATCHES], adapts=9),
    Family("vit, a new head", vit, **CLASSIFIES, **HEAD, fields={"train": ["classifier"]}),
    Family("dinov2", dinov2, **CLASSIFIES, **HEAD),
    Family("clip", clip, **PAIRS, adapts=26),
    Family("siglip", siglip, **PAIRS, adapts=27, left_out=(POOLED,), warns="name the attention"),
    Family(
        "siglip, with the attention of its head",
        siglip,
        **PAIRS,
        targets=[r"vision_model\.head\.attention", "q_proj"],
        adapts=6,
    ),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_from_a_plan_to_the_base_again(family: Family, tmp_path: Path):
    walk(family, tmp_path)
