"""Layers: sharded parameters and the modules that models are made of."""
