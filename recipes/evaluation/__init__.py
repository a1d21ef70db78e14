"""How good the weights are: greedy accuracy, avg@k and pass@k on named sets of problems."""
