"""A leader with several callers: the server that owns it, and front processes beside that."""
