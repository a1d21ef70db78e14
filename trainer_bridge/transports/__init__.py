"""How tensors travel to the engine, one file a transport."""
