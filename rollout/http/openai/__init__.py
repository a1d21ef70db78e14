"""OpenAI's dialect, with vLLM's fields."""
