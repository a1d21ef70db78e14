"""A training run as a source of the page, from the folder that it leaves."""
