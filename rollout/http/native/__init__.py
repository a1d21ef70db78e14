"""The native dialect, which the others translate into."""
