"""What a configuration means on a model: targets, costs, words; nothing is changed."""
