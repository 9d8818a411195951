"""The kinds of layers that adapters stand on, a file for each, and the one table of them."""
