"""What is told of each request: its id, a line of the access log, a span of a trace."""
