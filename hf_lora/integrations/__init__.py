"""What stands in, or in front of, other libraries' classes for a wrapped model."""
