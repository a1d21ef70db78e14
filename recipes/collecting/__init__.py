"""From problems to the batches of an update."""
