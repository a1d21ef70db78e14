"""The host side of the engine: everything that decides and nothing that touches a tensor."""
