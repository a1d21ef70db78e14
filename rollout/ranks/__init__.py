"""The ranks of a replica: what a leader sends them, and who watches them."""
