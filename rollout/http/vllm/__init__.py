"""vLLM's dialect: each file translates, `rollout.http.updates` decides."""
