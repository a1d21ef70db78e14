"""The parts of a Hugging Face tokenizer folder, each read as transformers reads it."""
