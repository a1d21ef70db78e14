"""Replies with a journal beside them, from which another server can go on."""
