"""The table of models that hf_lora is held against PEFT on: tiny, random, every kind of layer.

Each has two layers of width 32 and no dropout, so that train and eval mode compute the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

VOCABULARY = 96
SEQUENCE = 7
BATCH = 2
WIDTH = 32
INNER = 64
LAYERS = 2
HEADS = 4

Inputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model and how to adapt it."""

    name: str
    build: Callable[[], nn.Module]
    """Return the model; equal weights each time, in eval mode, on the device of the context."""

    inputs: Callable[[], Inputs]
    """Return keyword arguments of the forward; equal each time."""

    targets: tuple[str, ...]
    """Last names of the layers to adapt: all that a block has, unless a comment says otherwise."""

    exception: str
    """Whole tail of the one layer that gets another rank and strength."""

    head: str | None = None
    """Last name of the fresh head to train in full, for models that have one."""


def _text(
    model_class: type[nn.Module], config_class: type, **fields: Any
) -> Callable[[], nn.Module]:
    """Return a builder for a model whose configuration uses the usual names."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _build(model_class, config_class, **sizes | fields)


def _build(
    model_class: type[nn.Module], config_class: type, **fields: Any
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(7)
        model = model_class(config_class(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                # biases and norms start at 0 or 1, where a mistake with them would not show
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    return build


def _tokens(**more: Callable[[torch.Generator], torch.Tensor]) -> Callable[[], Inputs]:
    return lambda: _draw(input_ids=_ids, **more)


def _draw(**kinds: Callable[[torch.Generator], torch.Tensor]) -> Inputs:
    generator = torch.Generator().manual_seed(11)
    return {name: kind(generator) for name, kind in kinds.items()}


def _ids(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, SEQUENCE), generator=generator)


def _padding(generator: torch.Generator) -> torch.Tensor:
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def _pixels(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(BATCH, 3, 16, 16, generator=generator)


def _spectrogram(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(BATCH, 8, 32, generator=generator)


_LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BART_LIKE = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
# Fewer keys than queries: layers whose two sides differ.
_GROUPED = {"num_key_value_heads": 2}
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

ARCHITECTURES = (
    Architecture(
        name="llama",
        build=_text(hf.LlamaForCausalLM, hf.LlamaConfig, **_GROUPED, tie_word_embeddings=False),
        inputs=_tokens(),
        targets=_LLAMA_LIKE,
        exception="layers.1.self_attn.v_proj",
    ),
    Architecture(
        name="qwen3",
        build=_text(hf.Qwen3ForCausalLM, hf.Qwen3Config, **_GROUPED, head_dim=8),
        inputs=_tokens(attention_mask=_padding),
        targets=_LLAMA_LIKE,
        exception="layers.0.mlp.down_proj",
    ),
    Architecture(
        name="gemma3",  # sliding and full attention, tied head
        build=_text(
            hf.Gemma3ForCausalLM,
            hf.Gemma3TextConfig,
            **_GROUPED,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        inputs=_tokens(),
        targets=_LLAMA_LIKE,
        exception="layers.0.self_attn.o_proj",
    ),
    Architecture(
        name="phi3",  # query, key and value in one layer, gate and up in another
        build=_text(hf.Phi3ForCausalLM, hf.Phi3Config, **_GROUPED),
        inputs=_tokens(),
        targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        exception="layers.1.mlp.gate_up_proj",
    ),
    Architecture(
        name="gpt2",  # Conv1D, which keeps its weight transposed
        build=_build(
            hf.GPT2LMHeadModel,
            hf.GPT2Config,
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        inputs=_tokens(),
        targets=("c_attn", "c_proj", "c_fc"),
        exception="h.1.mlp.c_fc",
    ),
    Architecture(
        name="gpt_neox",  # attention and feed-forward in parallel, biases
        build=_text(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig),
        inputs=_tokens(),
        targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        exception="layers.0.attention.dense",
    ),
    Architecture(
        name="mistral",
        build=_text(hf.MistralForCausalLM, hf.MistralConfig, **_GROUPED, sliding_window=4),
        inputs=_tokens(attention_mask=_padding),
        targets=("q_proj", "v_proj"),  # as most adapters out there: two layers of a block only
        exception="layers.0.self_attn.q_proj",
    ),
    Architecture(
        name="t5",
        build=_build(
            hf.T5ForConditionalGeneration,
            hf.T5Config,
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=INNER,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
        inputs=_tokens(decoder_input_ids=_ids, attention_mask=_padding),
        targets=("q", "k", "v", "o", "wi", "wo"),
        exception="decoder.block.1.layer.1.EncDecAttention.q",
    ),
    Architecture(
        name="bart",
        build=_build(
            hf.BartForConditionalGeneration,
            hf.BartConfig,
            **_ENCODER_DECODER,
            max_position_embeddings=32,
        ),
        inputs=_tokens(decoder_input_ids=_ids, attention_mask=_padding),
        targets=_BART_LIKE,
        exception="decoder.layers.0.encoder_attn.v_proj",
    ),
    Architecture(
        name="bert",
        build=_text(hf.BertForSequenceClassification, hf.BertConfig, **_NO_DROPOUT, num_labels=3),
        inputs=_tokens(attention_mask=_padding),
        targets=("query", "key", "value", "dense"),
        exception="layer.1.output.dense",
        head="classifier",
    ),
    Architecture(
        name="vit",
        build=_build(
            hf.ViTForImageClassification,
            hf.ViTConfig,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=8,
            num_labels=3,
            **_NO_DROPOUT,
        ),
        inputs=lambda: _draw(pixel_values=_pixels),
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        exception="layers.0.attention.v_proj",
        head="classifier",
    ),
    Architecture(
        name="whisper",
        build=_build(
            hf.WhisperForConditionalGeneration,
            hf.WhisperConfig,
            **_ENCODER_DECODER,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            begin_suppress_tokens=None,
        ),
        inputs=lambda: _draw(input_features=_spectrogram, decoder_input_ids=_ids),
        targets=_BART_LIKE,
        exception="encoder.layers.1.fc2",
    ),
)

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
each_with_head = pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.head], ids=lambda a: a.name
)
