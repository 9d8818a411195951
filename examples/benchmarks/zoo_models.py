"""Tiny random models of every type that transformers' auto classes know, for ``zoo.py``.

A type's own configuration class says what its sizes are called. They are made small by their names,
in all parts of a configuration; :data:`zoo_by_hand.FIELDS` holds what no rule gives.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

from examples.benchmarks.zoo_by_hand import FIELDS, PREFERRED

VOCABULARY = 99
FIRST_WORD = 60
"""Special tokens have smaller numbers than this, words have not."""

ORDER = (
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_CAUSAL_LM",
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_MULTIMODAL_LM",
    "FOR_MASKED_LM",
    "FOR_CTC",
    "FOR_SEQUENCE_CLASSIFICATION",
    "FOR_IMAGE_CLASSIFICATION",
    "FOR_AUDIO_CLASSIFICATION",
)
"""The mappings of auto classes of which a type's class is taken first; then any other."""

BARE = "MAPPING_NAMES"
"""That of models without a head, which comes last."""


def mappings() -> dict[str, dict[str, Any]]:
    """Return name to content of the mappings from types to model classes, the preferred first."""
    found = {
        name.removeprefix("MODEL_").removesuffix("_MAPPING_NAMES"): dict(value)
        for name, value in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
    }
    rank = {name: number for number, name in enumerate(ORDER)} | {BARE: len(found)}
    return {n: found[n] for n in sorted(found, key=lambda n: (rank.get(n, len(ORDER)), n))}


def types() -> list[str]:
    """Return all model types that some auto class of models knows, sorted."""
    return sorted({kind for mapping in mappings().values() for kind in mapping})


def classes(kind: str) -> list[str]:
    """Return the names of a type's classes, the preferred first."""
    found: dict[str, None] = dict.fromkeys(PREFERRED.get(kind, ()))
    for mapping in mappings().values():
        named = mapping.get(kind, ())
        found |= dict.fromkeys((named,) if isinstance(named, str) else named)
    return list(found)


class Sizes:
    """One way to make a configuration small.

    Args:
        kv_heads: Heads of keys and values; some types want as many as there are others.
        head: Width of a head, of which there are four.
        thorough: Whether also numbers are made small whose names say little.
        fill: Whether sizes that a default leaves open are given.
    """

    def __init__(
        self, kv_heads: int = 2, head: int = 8, *, thorough: bool = False, fill: bool = False
    ):
        self.wide = 4 * head
        self.head = head
        self.thorough = thorough
        self.fill = (
            {"head_dim": head, "num_key_value_heads": 4, "n_routed_experts": 4} if fill else {}
        )
        wide = self.wide
        table = (
            ("vocab(ulary)?_size.*|num_embeddings", VOCABULARY),
            ("rotary_dim", head),
            ("kv_heads|key_value_heads|kv_groups|query_groups", kv_heads),
            ("attention_heads|n?heads|num_heads|n_head|num_head", 4),
            ("head_dim|head_size|d_kv|kv_channels|headdim", head),
            ("lora_rank|lora_dim|rank", 8),
            ("experts_per_tok(en)?|top_?k|moe_k", 2),
            ("topk_group", 1),
            ("n_group", 2),
            ("experts", 4),
            ("max_.*positions?(_embeddings)?|n_positions|n_ctx", 64),
            ("intermediate_size|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner", 48),
            ("mlp_dim|inner_dim|inner_size|intermediate_dim|feed_forward.*(dim|size)", 48),
            ("hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_(size|dim)", wide),
            ("model_dim|encoder_dim|decoder_dim|embed_size|dim|width|emb_dim|d_embed", wide),
            ("projection_dim|proj_dim|output_dim|out_hidden_size|proj_size", wide),
            ("projector_dim|d_latents|latent_dim|mlp_hidden_dim", wide),
            ("image_size", 32),
            ("patch_size", 8),
            ("num_(queries|query_tokens|detection_tokens|latents)", 6),
            ("sliding_window|attention_window|window_size|local_window", 8),
            ("codebook_size|num_labels", 16),
            ("groups", 4),
            ("context_size", 32),
            ("num_kv_shared_layers", 0),
            ("channels", wide),
        )
        self.table = [(re.compile(rf"(.*_)?({names})"), size) for names, size in table]

    def of(self, key: str, value: int) -> int:
        """Return a number that is not larger, and small if its name is that of a size."""
        for pattern, size in self.table:
            if pattern.fullmatch(key):
                return min(value, size)
        if self.thorough and value > 64 and _SIZE.fullmatch(key):
            return self.wide
        return value


WAYS = (
    Sizes(),
    Sizes(kv_heads=4),
    Sizes(thorough=True),
    Sizes(kv_heads=4, head=16),
    Sizes(kv_heads=4, fill=True),
    Sizes(kv_heads=4, head=16, thorough=True),
)
"""What is tried in turn."""

_SIZE = re.compile(r".*(dim|size|width|channels|filters|features|units)")
_LAYERS = re.compile(
    r"(.*_)?(num_|n_)?(.*_)?layers?|(.*_)?(num_|n_)?(.*_)?(blocks?|depth)|n_layer|num_block_records"
)
_KEEP = re.compile(
    r".*(num_channels|in_channels|in_chans|audio_channels|kernel.*|stride.*|type_vocab_size)"
    r"|num_feat_extract_layers|num_mel_bins|.*_cost|.*loss.*|vision_feature_layer"
    r"|num_hash_layers|.*select_layer|.*feature_layers?|num_residual_layers"
)
_TOKEN = re.compile(r"(.*_)?token_(id|ids|index)|(.*_)?(bos|eos|pad|image|video|audio)_(id|index)")
_STATES = (
    ("mamba_n_heads", "mamba_d_head"),
    ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
    ("num_heads", "head_dim"),
)
_PLACES = re.compile(r".*(feature_layers?|_indexes|_indices|_idxs?|layer_ids|_layers)")
_STAGES = ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices")
_DERIVED = (*_STAGES, "layers_block_type")
"""What follows from other fields."""


def shrink(config: dict[str, Any], sizes: Sizes, given: dict[int, int]) -> dict[str, Any]:
    """Return the fields of a configuration, parts included, with small sizes for large ones.

    Args:
        config: The fields.
        sizes: What is small.
        given: Numbers of special tokens to the small ones that they have got, for all parts.
    """
    picked = _picked(config)
    total = _layers(config)
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DERIVED:
            continue
        if isinstance(value, dict) and key == "per_layer_config":
            small[key] = {i: value[j] for i, j in enumerate(picked) if j in value}
        elif isinstance(value, dict) and "rope" in key:
            small[key] = _rope(value, sizes)
        elif isinstance(value, dict) and ("model_type" in value or key.endswith("config")):
            small[key] = shrink(value, sizes, given)
        elif isinstance(value, list) and total > 2 and len(value) == total:
            small[key] = [value[i] for i in picked]
        else:
            small[key] = _small(key, value, sizes, given, max(len(picked), 2), config)
    small |= {key: value for key, value in sizes.fill.items() if small.get(key, 0) is None}
    return _with_states(small)


def _with_states(small: dict[str, Any]) -> dict[str, Any]:
    """Return fields in which heads of a state-space model have the width of its inner states."""
    expand = small.get("mamba_expand", small.get("expand"))
    for heads, head in _STATES:
        number = small.get(heads)
        if isinstance(expand, int) and isinstance(number, int) and isinstance(small.get(head), int):
            return small | {head: expand * small["hidden_size"] // number}
    return small


def _layers(config: dict[str, Any]) -> int:
    """Return how many layers there are, if they are in one list."""
    names = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
    found = [config[name] for name in names if isinstance(config.get(name), int)]
    return found[0] if found and "depths" not in config else 0


def _picked(config: dict[str, Any]) -> list[int]:
    """Return the layers to keep: for each combination of what is said of layers, the first."""
    total = _layers(config)
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == total > 2]
    own = config.get("per_layer_config")
    if not lists and not own:
        return list(range(min(total, 2)))
    seen: dict[str, int] = {}
    for i in range(total):
        seen.setdefault(str([each[i] for each in lists] + [bool(own) and i in own]), i)
    found = sorted(seen.values())[:6]
    return found if len(found) > 1 else [0, 1]


def _rope(value: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    if isinstance(value.get("mrope_section"), list):
        quarter = sizes.head // 8
        return value | {"mrope_section": [2 * quarter, quarter, quarter]}
    return {k: _rope(v, sizes) if isinstance(v, dict) else v for k, v in value.items()}


def _small(
    key: str, value: Any, sizes: Sizes, given: dict[int, int], layers: int, config: dict[str, Any]
) -> Any:
    numbers = isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value)
    if numbers and _PLACES.fullmatch(key):
        return sorted({min(v, layers - 1) for v in value})
    if isinstance(value, bool) or _KEEP.fullmatch(key):
        return value
    if _TOKEN.fullmatch(key):
        many = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and v >= 0 for v in many):
            return value
        new = [given.setdefault(v, len(given)) for v in many]
        return new if isinstance(value, list) else new[0]
    if isinstance(value, int):
        if _LAYERS.fullmatch(key) and key != "num_kv_shared_layers":
            return value if "depths" in config and key == "num_layers" else min(value, layers)
        return sizes.of(key, value)
    if numbers:
        return _small_list(key, list(value), sizes)
    return value


def _small_list(key: str, value: list[int], sizes: Sizes) -> list[int]:
    if re.fullmatch(r"(.*_)?(depths?|layers|num_blocks|(layer|block)_repeats|num_layers)", key):
        return [min(v, 1) for v in value]
    if re.fullmatch(r"(.*_)?(num_heads|num_attention_heads|heads)", key):
        return [min(v, 2) for v in value]
    if re.fullmatch(r"(.*_)?(hidden_sizes|embed_dims?|conv_dim|dims?|hidden_channels)", key):
        return [max(8, v * sizes.wide // max(value) // 8 * 8) for v in value]
    if key.endswith("image_size"):
        return [min(v, 32) for v in value]
    return value


def configs(kind: str) -> Iterator[Any]:
    """Yield small configurations of a type, one for each way, or the error that it raised."""
    cls = configuration_auto.CONFIG_MAPPING[kind]
    hand = FIELDS.get(kind, {})
    for sizes in WAYS:
        try:
            if callable(hand):
                yield hand(cls)
                return
            fields = shrink(cls(**hand.get("first", {})).to_dict(), sizes, {})
            yield _without_cache(cls.from_dict(_over(fields, hand)))
        except Exception as error:  # whatever a configuration's own checks raise
            yield error


def _without_cache(config: Any) -> Any:
    for part in parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside of it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def _over(fields: dict[str, Any], hand: dict[str, Any]) -> dict[str, Any]:
    """Return fields with those written by hand in their place, in parts as well."""
    changed = dict(fields)
    for key, value in hand.items():
        if key == "first":
            continue
        part = changed.get(key)
        changed[key] = (
            _over(part, value) if isinstance(part, dict) and isinstance(value, dict) else value
        )
    return changed
