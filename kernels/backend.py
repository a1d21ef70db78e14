"""The names a caller chooses an implementation by."""

from __future__ import annotations

from typing import Literal

KernelBackend = Literal["torch", "triton"]
NAMES: tuple[str, ...] = ("torch", "triton")


def unknown_backend(name: object) -> ValueError:
    """The error of an op that was asked for an implementation it does not have."""
    return ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
