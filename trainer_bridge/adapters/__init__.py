"""How each kind of trainer yields its weights: full tensors under Hugging Face names."""
