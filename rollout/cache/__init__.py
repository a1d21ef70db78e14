"""KV pages as integers: the pool, the prefix tree and the manager that joins them."""
