"""A request from JSON to sequences, and from their outputs to the reply."""
