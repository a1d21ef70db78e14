"""Trainers: a causal LM, its optimizer, and how a batch is packed for it."""
