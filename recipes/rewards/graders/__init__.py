"""Graders in processes of their own: what they do costs no other reply anything."""
