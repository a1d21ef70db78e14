"""What stands between the turns of a conversation, in a model's own chat template."""
