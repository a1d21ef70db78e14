"""The figures of a server: samples of its engine, and what its engine was told to do."""
