"""The engine as the server's handlers see it."""
