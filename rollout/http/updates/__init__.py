"""Pauses, memory and weight updates, under every dialect."""
