"""Pure functions on tensors: one folder an op, each with a plain-torch reference.

An op is imported from its folder (`from kernels.norm import rms_norm`) and told which
implementation to run by `backend`: "torch" is the reference, which is also what runs on
CPU; "triton" is the GPU kernel, tested against it. Nothing here knows requests, models or
configuration.

`kernels` is also the name of Hugging Face's package that transformers looks for and uses from
version 0.9 on. `__version__` stays below that, so that ours alone is never taken for it; where it
is installed as well, its names and modules are found here beside ours.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__path__ = extend_path(__path__, __name__)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A name of Hugging Face's package (`hub_package.py`), or AttributeError."""
        from kernels.hub_package import attribute

        if name.startswith("__"):
            raise AttributeError(f"module 'kernels' has no attribute {name!r}")
        return attribute(name, __path__)
