"""The model card of an adapter: its facts, its words, its code."""
