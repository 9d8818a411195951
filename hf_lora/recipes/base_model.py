"""The base model from a recipe or the command line: configuration, tokenizer, weights, skeleton."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_lora.adapter_io.tasks import class_in
from hf_lora.errors import ConfigError
from hf_lora.recipes.recipe import Base

# Asked on a terminal otherwise, in the middle of a command; code from the Hub is not run.
SAFE = {"trust_remote_code": False}


def load_config(base: Base) -> Any:
    """Load the configuration of a base model.

    Raises:
        ConfigError: transformers cannot; its words are in the message.
    """
    with explained(base.model, "configuration"):
        return AutoConfig.from_pretrained(base.model, **_where(base), **SAFE)


def check_writes_text(config: Any) -> None:
    """Raise unless a base was saved as a causal language model, which is what a recipe trains.

    Another one would get a head that no checkpoint filled, if it loaded at all.

    Raises:
        ConfigError: It was saved as something else, or transformers has no such class for it.
    """
    saved = next(iter(config.architectures or ()), None)
    made = class_in("AutoModelForCausalLM", config)
    remote = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in remote or (made and saved in (None, made.__name__)):
        return
    raise ConfigError(
        f"{config.name_or_path!r} is a {saved or type(config).__name__}, and a causal language "
        "model is needed here. Classifiers are trained with task: classification. Anything else: "
        "load it in Python with the class that it needs, hf_lora.wrap(...) it, and train it with "
        "transformers' Trainer."
    )


def load_tokenizer(base: Base) -> Any:
    """Load the tokenizer of a base model, or the other one that the recipe names.

    Raises:
        ConfigError: transformers cannot; its words are in the message.
    """
    where = {} if base.tokenizer else _where(base)
    with explained(base.tokenizer or base.model, "tokenizer"):
        return AutoTokenizer.from_pretrained(base.tokenizer or base.model, **where, **SAFE)


def load_model(
    base: Base, loader: str = "AutoModelForCausalLM", more: Mapping[str, Any] | None = None
) -> Any:
    """Load a model, quantized if the recipe says so.

    Args:
        base: Which.
        loader: The auto class.
        more: What else ``from_pretrained`` is told.

    Raises:
        ConfigError: transformers cannot; its words are in the message.
    """
    options: dict[str, Any] = {"dtype": base.dtype}
    with explained(base.model, "model"):
        if base.load_in_4bit or base.load_in_8bit:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=base.load_in_4bit,
                load_in_8bit=base.load_in_8bit,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=_compute_dtype(base),
            )
        return getattr(transformers, loader).from_pretrained(
            base.model, **_where(base), **options, **(more or {}), **SAFE
        )


def skeleton(config: Any, loader: str | None = None) -> nn.Module:
    """Build the model that a configuration describes, on the meta device: all but the weights.

    If they lie in the same folder their names are read, and tell what the checkpoint lacks.

    Args:
        config: Of the model.
        loader: The auto class to build it with; by default it is the class that it was saved as.

    Raises:
        ConfigError: transformers has no model for it.
    """
    dtype = config.dtype or torch.float32
    named: list[Any] = [getattr(transformers, n, None) for n in config.architectures or ()]
    if loader is not None and (made := class_in(loader, config)) is not None:
        named = [made]
    if named and named[0] is not None and _has_plain_weights(config):
        with explained(config.name_or_path, "model"):
            return named[0].from_pretrained(
                config.name_or_path, config=config, dtype=dtype, device_map="meta", **SAFE
            )
    with explained(config.name_or_path, "model"), torch.device("meta"):
        if named and named[0] is not None:
            return named[0](config).to(dtype)
        try:
            return AutoModelForCausalLM.from_config(config).to(dtype)
        except ValueError:  # no causal language model
            return AutoModel.from_config(config).to(dtype)


def _has_plain_weights(config: Any) -> bool:
    quantized = getattr(config, "quantization_config", None) is not None
    return not quantized and any(Path(config.name_or_path).glob("*.safetensors"))


def _compute_dtype(base: Base) -> str:
    if base.dtype != "auto":
        return base.dtype
    return "bfloat16" if torch.accelerator.is_available() else "float32"


def _where(base: Base) -> dict[str, Any]:
    named = {"revision": base.revision, "gguf_file": base.gguf_file}
    return {name: value for name, value in named.items() if value is not None}


@contextlib.contextmanager
def explained(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a file that it cannot load into one ConfigError."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ConfigError(f"The {what} of {name!r} cannot be loaded: {error}") from error
