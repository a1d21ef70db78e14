"""The engines of a run."""
