"""What processes write of what they do: one form for people, one for programs."""
