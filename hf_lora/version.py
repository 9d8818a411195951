"""The version of hf_lora."""

__version__ = "0.1.0"
