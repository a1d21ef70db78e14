"""What is drafted ahead of the sampled tokens: how many, from where, and what came of it."""
