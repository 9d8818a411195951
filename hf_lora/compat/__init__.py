"""What is private to other libraries, one function for each part that hf_lora touches."""
