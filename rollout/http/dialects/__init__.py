"""Dialects of external trainers: each file translates, `rollout.http.control` decides."""
