"""Text to ids and back, and chats to text, without torch: the engine speaks ids only."""
