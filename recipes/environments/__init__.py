"""Tasks: where prompts come from, and how a reply to one is verified."""
