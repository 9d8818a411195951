"""The Hugging Face Hub: downloads, uploads, and the card of a repository."""
