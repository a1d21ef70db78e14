"""Pure functions on tensors: one folder an op, each with a plain-torch reference.

An op is imported from its folder (`from kernels.norm import rms_norm`) and told which
implementation to run by `backend`: "torch" is the reference, which is also what runs on
CPU; "triton" is the GPU kernel, tested against it. Nothing here knows requests, models or
configuration.

`kernels` is also the name of a package on the Hub that transformers looks for and uses from
version 0.9 on; `__version__` stays below that so that the two are never confused.
"""

__version__ = "0.1.0"
