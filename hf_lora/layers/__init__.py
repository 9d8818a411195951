"""The patched modules: a host's own class with low-rank factors or trained copies added."""
