"""What grammars are written in: each kind checked, and written as rules of one dialect."""
