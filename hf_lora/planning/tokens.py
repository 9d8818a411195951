"""Tokens into the numbers of their rows, by a tokenizer: in a configuration's ``train_rows``."""

import dataclasses
from typing import Any

from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError, listing
from hf_lora.text import some


def with_row_numbers(config: LoRAConfig, tokenizer: Any = None) -> LoRAConfig:
    """Return a configuration whose ``train_rows`` are numbers only.

    Args:
        config: May name tokens there.
        tokenizer: One of transformers', or a processor that has one.

    Raises:
        ConfigError: There are tokens and no tokenizer, or it does not have one of them.
    """
    named = {
        pattern: tokens
        for pattern, rows in config.train_rows.items()
        if (tokens := [row for row in rows if isinstance(row, str)])
    }
    if not named:
        return config
    every = list(dict.fromkeys(token for tokens in named.values() for token in tokens))
    if tokenizer is None:
        raise ConfigError(
            f"train_rows names tokens, and which rows are theirs only a tokenizer knows: "
            f"{some(every)}. Give it as well (tokenizer=...), or give numbers: "
            "tokenizer.convert_tokens_to_ids([...])."
        )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    ids = dict(zip(every, tokenizer.convert_tokens_to_ids(every), strict=True))
    # what it does not know becomes the number of another token, the one for the unknown
    back = tokenizer.convert_ids_to_tokens([row or 0 for row in ids.values()])
    unknown = [t for t, said in zip(every, back, strict=True) if ids[t] is None or said != t]
    if unknown:
        raise ConfigError(
            listing(
                "train_rows names what the tokenizer does not have as one token",
                unknown,
                "tokenizer.add_tokens([...]) adds tokens, and then "
                "model.resize_token_embeddings(len(tokenizer)) their rows.",
            )
        )
    rows = {
        pattern: [row if isinstance(row, int) else ids[row] for row in given]
        for pattern, given in config.train_rows.items()
    }
    return dataclasses.replace(config, train_rows=rows)
