"""What an engine keeps between requests: sessions, and rollouts that are captured."""
