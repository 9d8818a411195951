"""Whole models: planning, patching, and the adapters that a model has."""
