"""The keys and values of all tokens on one rank, addressed by page."""
