"""A tiny base on disk, files beside it, and the command in this process."""

from tests.tiny_base import base, run, tokenizer, write

__all__ = ["base", "run", "tokenizer", "write"]
