"""What no rule gives for ``zoo.py``: small fields of single types, and which class to take."""

from typing import Any

import torch

PREFERRED: dict[str, tuple[str, ...]] = {
    "reformer": ("ReformerForMaskedLM",),
}
"""Classes that are taken first."""

_SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 2,
    "num_static_categorical_features": 0,
}
_FOUR = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 32],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}

FIELDS: dict[str, Any] = {
    "autoformer": {"first": _SERIES},
    "informer": {"first": _SERIES},
    "time_series_transformer": {"first": _SERIES},
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deformable_detr": _RESNET,
    "detr": _RESNET,
    "table-transformer": _RESNET,
    "depth_anything": {"backbone_config": _FOUR},
    "prompt_depth_anything": {"backbone_config": _FOUR},
    "zoedepth": {"backbone_config": _FOUR},
    "chmv2": {"backbone_config": _FOUR},
    "efficientnet": {"hidden_dim": 2560},
    "esm": {"vocab_size": 99, "pad_token_id": 0, "mask_token_id": 1},
    "reformer": {"axial_pos_embds": False, "is_decoder": False, "attn_layers": ["local", "local"]},
    "perceiver": {"d_latents": 32, "d_model": 32},
    "lilt": {"hidden_size": 48},
    "xmod": {"default_language": "en_XX"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"num_hidden_layers": 6, "layer_types": ["mamba", "mamba", "hybrid"] * 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm5_next_text": {"index_kpool": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lw_detr_vit": {"image_size": 64},
    "lw_detr": {"backbone_config": {"image_size": 64}},
    "chameleon": {"vocabulary_map": {"<image>": 8}},
    "emu3": {"vocabulary_map": {"<image>": 8}},
    "xlnet": {"d_head": 8, "n_head": 4, "d_model": 32},
}
"""Fields that are put in the place of what the rules give, in parts of a configuration as well."""


def _series(config: Any) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    drawn = torch.Generator().manual_seed(2)
    return {
        "past_values": torch.randn(2, past, generator=drawn),
        "past_time_features": torch.randn(2, past, 2, generator=drawn),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length, generator=drawn),
        "future_time_features": torch.randn(2, config.prediction_length, 2, generator=drawn),
    }


def _regions(config: Any) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(60, 99, (2, 8), generator=drawn),
        "visual_feats": torch.randn(2, 4, config.visual_feat_dim, generator=drawn),
        "visual_pos": torch.rand(2, 4, 4, generator=drawn),
    }


def _queries(config: Any) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(2)
    return {
        "query_embeds": torch.randn(2, 4, config.hidden_size, generator=drawn),
        "encoder_hidden_states": torch.randn(2, 6, config.encoder_hidden_size, generator=drawn),
    }


def _patches(config: Any) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(2)
    shape = (2, config.context_length, config.num_input_channels)
    return {"past_values": torch.randn(shape, generator=drawn)}


def _decisions(config: Any) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(2)
    wide = {"states": config.state_dim, "actions": config.act_dim, "returns_to_go": 1}
    return {name: torch.randn(2, 5, size, generator=drawn) for name, size in wide.items()} | {
        "rewards": torch.zeros(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5).clone(),
    }


INPUTS: dict[str, Any] = {
    "patchtst": _patches,
    "patchtsmixer": _patches,
    "decision_transformer": _decisions,
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "lxmert": _regions,
    "blip_2_qformer": _queries,
}
"""Arguments of a forward, made from the configuration."""
