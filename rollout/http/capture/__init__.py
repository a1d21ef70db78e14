"""Capture: OpenAI calls below a base URL of a rollout, recorded token by token."""
