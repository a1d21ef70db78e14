"""Text at the edges of an engine that speaks token ids. Imports nothing heavy."""
