"""One address for several servers: which of them answers, and what happens when one dies."""
