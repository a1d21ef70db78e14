"""Data sets of this machine as rows, and their columns as problems."""
