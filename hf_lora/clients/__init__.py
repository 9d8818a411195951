"""Adapters in other software: who can use one and why not, and files as each of them reads them."""
