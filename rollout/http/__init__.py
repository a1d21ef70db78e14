"""The HTTP front: routes, streams, and the client of the engine behind them. No torch."""
