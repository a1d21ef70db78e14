"""Which worker a request goes to: decided by numbers alone, and tested without a server."""
