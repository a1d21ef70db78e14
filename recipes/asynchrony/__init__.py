"""Asynchronous training: rollouts go on while the policy learns from older ones (docs/async.md)."""
