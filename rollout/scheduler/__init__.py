"""Continuous batching: which sequence computes what in each step, and what came of it."""
