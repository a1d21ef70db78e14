"""Text of a reply to reasoning, content and calls of functions, while it arrives."""
