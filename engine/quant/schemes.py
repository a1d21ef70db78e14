"""From the name of a scheme to how linear layers store their weights."""

from __future__ import annotations

from engine.config import KernelBackend, Quantization
from engine.errors import UnsupportedOption
from engine.quant.base import LinearMethod, Unquantized
from engine.quant.int8 import Int8


def linear_method(name: Quantization, backend: KernelBackend) -> LinearMethod:
    """The scheme that a flag names. Raises UnsupportedOption for one that is not built."""
    if name == "none":
        return Unquantized()
    if name == "int8":
        return Int8(backend)
    raise UnsupportedOption(
        f"{name!r} is not built; use 'int8', or 'none' for the model's own dtype",
        field="quantization",
    )
