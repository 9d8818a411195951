"""Models that see and write: each tower is a target of its own, and what is left out is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.families.walk import Family, walk

WORDS, IMAGE, PICTURE = 64, 63, 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WRITES = {
    **SIZES,
    "vocab_size": WORDS,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PATCHES = 4
"""Of a picture of 16 by 16 in patches of 8 by 8, after what a model makes of them."""


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def words(count: int, first: int | None = None, last: int | None = None) -> torch.Tensor:
    """Draw sentences with a picture in each, between two tokens if a model wants them."""
    rows = torch.randint(3, 50, (count, PATCHES + 6), generator=torch.Generator().manual_seed(2))
    rows[:, 2 : 2 + PATCHES] = IMAGE
    if first is not None:
        rows[:, 1], rows[:, 2 + PATCHES] = first, last
    return rows


def llava() -> Any:
    sees = hf.CLIPVisionConfig(**SIZES, image_size=PICTURE, patch_size=8)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=sees,
            text_config=hf.LlamaConfig(**WRITES),
            image_token_index=IMAGE,
            image_seq_length=PATCHES,
        )
    )


def qwen2_5_vl() -> Any:
    turns = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    sees = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config={**WRITES, "rope_parameters": turns},
            vision_config=sees,
            image_token_id=IMAGE,
            video_token_id=62,
            vision_start_token_id=58,
            vision_end_token_id=59,
        )
    )


def with_pictures() -> dict[str, Any]:
    return {"input_ids": words(2), "pixel_values": drawn(2, 3, PICTURE, PICTURE)}


def with_patches() -> dict[str, Any]:
    """Qwen's pictures come in rows of patches, of 3 colours, twice, 4 by 4."""
    return {
        "input_ids": words(2, 58, 59),
        "pixel_values": drawn(2 * 4 * PATCHES, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def described(count: int = 8) -> list[dict[str, Any]]:
    both = zip(words(count), drawn(count, 3, PICTURE, PICTURE), strict=True)
    return [{"input_ids": ids, "labels": ids, "pixel_values": pixels} for ids, pixels in both]


def described_in_patches(count: int = 8) -> list[dict[str, Any]]:
    patches = drawn(count, 4 * PATCHES, 3 * 2 * 4 * 4)
    both = zip(words(count, 58, 59), patches, strict=True)
    return [{"input_ids": ids, "labels": ids, "pixel_values": pixels} for ids, pixels in both]


def in_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put rows together as Qwen's processor does."""
    batch = hf.default_data_collator(rows)
    grid = torch.tensor([[1, 4, 4]] * len(rows))
    return {**batch, "pixel_values": batch["pixel_values"].flatten(0, 1), "image_grid_thw": grid}


LLAVA = {"inputs": with_pictures, "answer": "logits", "rows": described, "trainer": hf.Trainer}
QWEN = {
    "inputs": with_patches,
    "answer": "logits",
    "rows": described_in_patches,
    "trainer": hf.Trainer,
    "options": {"data_collator": in_rows},
}
UNSEEN = "received no gradient at the first step:\n  - model.vision_tower.encoder.layers.1"
"""Of LLaVA's eye the last layer but one is looked at; nothing else is left out silently."""

FAMILIES = [
    Family("llava", llava, **LLAVA, adapts=28, left_out=("lm_head",), silent=UNSEEN),
    Family("llava's eye", llava, **LLAVA, targets=r"vision_tower\..*0.*_proj", adapts=4),
    Family(
        "llava's voice",
        llava,
        **LLAVA,
        fields={"exclude": ["vision_tower.*", "multi_modal_projector.*"]},
        adapts=14,
    ),
    Family("qwen2.5-vl", qwen2_5_vl, **QWEN, adapts=26, left_out=("lm_head",)),
    Family(
        "qwen2.5-vl's eye", qwen2_5_vl, **QWEN, targets=["visual.*qkv", "visual.*proj"], adapts=11
    ),
    Family(
        "qwen2.5-vl by names",
        qwen2_5_vl,
        **QWEN,
        targets=["q_proj", "v_proj"],
        adapts=4,
        warns=r"visual \(Qwen2_5_VisionTransformerPretrainedModel\): the targets mean none of",
    ),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_from_a_plan_to_the_base_again(family: Family, tmp_path: Path):
    walk(family, tmp_path)
