"""Trainings described by a file: reading it, its data, its runs and their record."""
