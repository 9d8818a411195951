"""Arithmetic on adapters in factored form: sums, differences, other ranks; no model is needed."""
