"""What hf_lora does inside transformers' Trainer."""
