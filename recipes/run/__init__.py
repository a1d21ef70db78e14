"""One run: its folder, its figures, what follows a step."""
