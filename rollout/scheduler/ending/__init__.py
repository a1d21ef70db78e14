"""How sequences end: which ones a command names, why, and their last outputs."""
