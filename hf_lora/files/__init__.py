"""Adapter folders: PEFT's format both ways, checked before anything is believed."""
