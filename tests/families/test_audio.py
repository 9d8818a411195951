"""Models that hear: Whisper, which writes what it hears, and wav2vec2, which spells it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.families.walk import Family, walk

BINS, FRAMES, SAMPLES, WORDS = 8, 32, 400, 48
BESIDE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(count: int, length: int, first: int = 3) -> torch.Tensor:
    return torch.randint(first, 20, (count, length), generator=torch.Generator().manual_seed(2))


def whisper() -> Any:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=WORDS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=BINS,
            max_source_positions=FRAMES // 2,
            max_target_positions=16,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **BESIDE,
        )
    )


def wav2vec2() -> Any:
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            vocab_size=20,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            conv_dim=(16, 16),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            **BESIDE,
        )
    )


def heard() -> dict[str, Any]:
    return {"input_features": drawn(2, BINS, FRAMES), "decoder_input_ids": words(2, 5)}


def transcribed() -> list[dict[str, Any]]:
    both = zip(drawn(8, BINS, FRAMES), words(8, 5), strict=True)
    return [{"input_features": sound, "labels": ids} for sound, ids in both]


def wave() -> dict[str, Any]:
    return {"input_values": drawn(2, SAMPLES)}


def spelled() -> list[dict[str, Any]]:
    both = zip(drawn(8, SAMPLES), words(8, 3), strict=True)
    return [{"input_values": sound, "labels": ids} for sound, ids in both]


WRITES = {
    "inputs": heard,
    "answer": "logits",
    "rows": transcribed,
    "trainer": hf.Seq2SeqTrainer,
    "options": {"kind": hf.Seq2SeqTrainingArguments},
}
SPELLS = {"inputs": wave, "answer": "logits", "rows": spelled, "trainer": hf.Trainer}
FAMILIES = [
    Family("whisper", whisper, **WRITES, adapts=32, left_out=("proj_out",)),
    Family(
        "whisper's front",
        whisper,
        **WRITES,
        targets=["conv1", "conv2", "q_proj"],
        adapts=8,
        peft_runs=False,  # the encoder reads conv1.stride, which PEFT's layers do not have
    ),
    Family("whisper's decoder", whisper, **WRITES, targets=r"decoder\..*_proj", adapts=16),
    Family("wav2vec2", wav2vec2, **SPELLS, adapts=13, left_out=("lm_head",)),
    Family("wav2vec2's front", wav2vec2, **SPELLS, targets=["conv", "attention"], adapts=10),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_from_a_plan_to_the_base_again(family: Family, tmp_path: Path):
    walk(family, tmp_path)
