"""One turn of a conversation, whichever dialect asks for it: OpenAI's chat body in, events out."""
