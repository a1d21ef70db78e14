"""What runs the requests of programs: a replica, or a server."""
