"""KV storage of one rank, addressed by page."""
