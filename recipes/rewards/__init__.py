"""Reward functions: text in, number out."""
