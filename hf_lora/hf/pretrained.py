"""Whether a model is one of transformers' own, for those above the layers."""

from hf_lora.compat.transformers import is_pretrained as is_pretrained
