"""The command line ``hf-lora``: each command is one call of the library, with words around it."""
