"""Replies that are programs: their code, their tests, and what they earn in the sandbox."""
