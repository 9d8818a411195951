"""What touches transformers' and the Hub's own classes."""
