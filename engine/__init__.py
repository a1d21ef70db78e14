"""One rank of the engine: everything that touches tensors.

Import the submodule you need; this package imports nothing, so that
`engine.protocol`, `engine.config` and `engine.errors` stay free of torch.
"""
