"""One rank of the engine: everything that touches tensors.

Import the submodule you need; this package imports nothing but what finds our `kernels`, so that
`engine.protocol`, `engine.config` and `engine.errors` stay free of torch.
"""

from engine import our_kernels

our_kernels.ensure()
