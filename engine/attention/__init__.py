"""Attention back ends over the paged KV pool, one file each; select.py says which and why."""
