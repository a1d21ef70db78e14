"""Weights on their way into the model: sources, load, checks, and the update transaction."""
