"""Prompt programs, part by part; `rollout/program.py` has what their authors import."""
