"""A server, or a router, as a replica: requests and commands over HTTP."""
