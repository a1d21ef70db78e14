"""Routes that say what the server is and how it does: health, facts, metrics, profiles."""
