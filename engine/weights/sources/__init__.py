"""Sources of weights: each an iterator of (Hugging Face name, full tensor)."""
