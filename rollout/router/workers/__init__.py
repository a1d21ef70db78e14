"""The servers behind a router: which there are, how each does, and whether it may be asked."""
