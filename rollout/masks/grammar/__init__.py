"""Structured output: masks of `Request.grammar`, through llguidance."""
