"""The server's side of the engine: commands and their replies, and what follows its death."""
