"""Which sequence computes what, step by step."""
