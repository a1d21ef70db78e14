"""Routes of sequences: read before their pages are given away, kept, and returned."""
