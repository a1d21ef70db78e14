"""Work for callers whom nobody trusts, in processes that can be stopped."""
