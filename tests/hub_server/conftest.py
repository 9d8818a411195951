"""Fixtures for the tests of the server itself."""

from .fixtures import hub

__all__ = ["hub"]
