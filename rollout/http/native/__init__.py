"""The native dialect, POST /generate and /command; the other dialects translate into it."""
