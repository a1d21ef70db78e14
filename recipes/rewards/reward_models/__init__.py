"""Reward models: sequence classifiers, in an engine of the run or behind a server."""
