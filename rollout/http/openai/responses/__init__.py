"""OpenAI's responses: a turn whose conversation may be kept here."""
