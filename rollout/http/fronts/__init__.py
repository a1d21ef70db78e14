"""Several processes that serve HTTP before one engine: the owner of the engine, and its fronts."""
