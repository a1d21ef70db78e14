"""Supervised fine-tuning: conversations as examples, and the run around them."""
