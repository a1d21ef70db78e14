"""Tasks: procedural prompts with answers that can be verified."""
