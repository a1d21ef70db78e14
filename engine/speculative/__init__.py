"""Tokens drafted ahead and verified together: what is drafted from, and the steps that verify."""
