"""Commands: their flags, what they show, and what they say when they fail."""
