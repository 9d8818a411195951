"""An adapter with its base and its tokenizer, as the commands that use one need them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, TextStreamer

from hf_lora.api import from_pretrained
from hf_lora.errors import ConfigError
from hf_lora.files.read import read_folder
from hf_lora.hub.download import locate
from hf_lora.recipes.base_model import SAFE, check_writes_text, explained
from hf_lora.recipes.estimate import warn_if_slow

TOKENIZER_FILE = "tokenizer_config.json"
"""What a tokenizer that was saved beside an adapter is told by."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A language model with an adapter, ready to answer."""

    model: Any
    tokenizer: Any
    base: str
    """Where the base came from."""

    def encode(self, messages: list[dict[str, str]] | str) -> dict[str, torch.Tensor]:
        """Return text as it stands, or messages as the chat template has them, as a batch of one.

        Raises:
            ConfigError: There are messages, and the tokenizer has no chat template.
        """
        if isinstance(messages, str):
            batch = self.tokenizer(messages, return_tensors="pt")
        elif not self.tokenizer.chat_template:
            raise ConfigError(
                "The tokenizer has no chat template, so there is no chat; generate continues text."
            )
        else:
            batch = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        names = ("input_ids", "attention_mask")
        return {name: batch[name].to(self.model.device) for name in names}

    def answer(
        self,
        messages: list[dict[str, str]] | str,
        *,
        most: int,
        temperature: float,
        stream: bool = False,
    ) -> str:
        """Return what the model writes next; show it as it comes if ``stream`` is said.

        Args:
            messages: A text to go on with, or a chat.
            most: New tokens that it may have.
            temperature: 0 for the likeliest token each time.
            stream: Whether to print it on standard output as it comes.

        Raises:
            ConfigError: The text is empty, or as for :meth:`encode`.
        """
        batch = self.encode(messages)
        count = batch["input_ids"].shape[1]
        if count == 0:
            raise ConfigError("There is no text to go on with.")
        pad = self.tokenizer.pad_token_id
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=most,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            eos_token_id=_ends(self.model, self.tokenizer),
            **sampling,
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            output = self.model.generate(
                **batch, generation_config=config, streamer=streamer if stream else None
            )
        return self.tokenizer.decode(output[0, count:], skip_special_tokens=True)


def open_adapter(
    source: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: str = "auto",
) -> Opened:
    """Load an adapter, the base that it names, and a tokenizer: the adapter's, or else the base's.

    Args:
        source: A folder, or the id of a repo on the Hub.
        base: Another folder or id of the base.
        revision: Of the adapter on the Hub.
        subfolder: Folder inside the source.
        dtype: Type to load the base in; auto: the one that it is stored in.

    Raises:
        ConfigError: The base writes no text, or has no tokenizer.
        AdapterFileError, BaseLoadError, HubError: As for :func:`hf_lora.from_pretrained`.
    """
    folder = locate(source, revision=revision, subfolder=subfolder)
    model = from_pretrained(folder, base=base, dtype=dtype)
    check_writes_text(model.config)
    if dtype == "auto":
        warn_if_slow(model.dtype, "--dtype {} answers sooner")
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    name = base or read_folder(folder).base or model.config.name_or_path
    beside = is_beside(folder)
    with explained(str(folder) if beside else name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder if beside else name, **SAFE)
    return Opened(model.eval(), tokenizer, str(name))


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Return the tokens that end an answer: the model's own list, and the tokenizer's."""
    said = model.generation_config.eos_token_id
    ids = {*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id} - {None}
    return sorted(ids) or None


def is_beside(folder: Path) -> bool:
    """Say whether a tokenizer was saved into a folder."""
    return (folder / TOKENIZER_FILE).is_file()
