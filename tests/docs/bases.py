"""Tiny models under the names of real ones, for the documentation's pages to load from a Hub."""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.tiny_base import tiny_model, tiny_tokenizer


def llama(folder: Path) -> None:
    """A Llama with a tokenizer and a chat template."""
    tokenizer = tiny_tokenizer()
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_only(folder: Path) -> None:
    """SmolLM2-360M by its numbers, for plans: no weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def bert(folder: Path) -> None:
    """A BERT without a head."""
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def sentences(folder: Path) -> None:
    """The same as a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    inner = folder.parent / "inner"
    bert(inner)
    transformer = Transformer(str(inner))
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling]).save(str(folder))


def vit(folder: Path) -> None:
    """A ViT that looks at images of 32 by 32."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    ViTModel(
        ViTConfig(
            image_size=32,
            patch_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def whisper(folder: Path) -> None:
    """A Whisper that hears one second."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    tokenizer = tiny_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|start|>")
    torch.manual_seed(0)
    WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=50,
            max_target_positions=64,
            num_mel_bins=80,
            decoder_start_token_id=start,
            bos_token_id=start,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": llama,
    "HuggingFaceTB/SmolLM2-135M": llama,
    "HuggingFaceTB/SmolLM2-360M-Instruct": config_only,
    "google-bert/bert-base-uncased": bert,
    "sentence-transformers/all-MiniLM-L6-v2": sentences,
    "google/vit-base-patch16-224-in21k": vit,
    "openai/whisper-tiny": whisper,
}


def write_all(folder: str) -> None:
    """Write each below a folder, at its name."""
    for name, make in MODELS.items():
        make(Path(folder) / name)
