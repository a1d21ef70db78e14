"""Grammars whose texts are calls, for a choice that forces one."""
