"""Pure functions on tensors: the low-rank product and how its factors start."""
