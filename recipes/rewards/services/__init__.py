"""Rewards that another program gives over HTTP: a service of the user's, or a judge."""
