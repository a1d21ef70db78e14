"""Pauses, memory and weight updates: one state machine, which every dialect calls."""
