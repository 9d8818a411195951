"""What every patched module is made of: roles, factors, routing and the ways to compute."""
