"""`python -m rollout chat`: a conversation with a server or a model, in a terminal or a pipe."""
