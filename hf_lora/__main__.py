"""``python -m hf_lora``, and so ``torchrun -m hf_lora`` and ``accelerate launch -m hf_lora``."""

from hf_lora.cli.main import app

app(prog_name="hf-lora")
