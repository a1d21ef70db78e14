"""Pure functions on tensors: advantages, losses, KL estimators, importance correction."""
