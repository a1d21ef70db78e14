"""The parts of one plan: rows that decode, prompts, pages, and who has to wait."""
