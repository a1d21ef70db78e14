"""The ranks of a replica: who sends them plans and commands, and who watches them."""
