"""What a rank refuses by name before it reads a weight: options that cannot be honoured."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.errors import UnsupportedOption
from engine.speculative.checks import check_speculative


def check_options(config: EngineConfig, *, num_labels: int) -> None:
    """A rank calls this first. num_labels: of a classifier; 0 of a model that generates.

    Raises UnsupportedOption and InvalidRequest.
    """
    if config.numerics != "fast":
        raise UnsupportedOption(
            f"{config.numerics!r} is not built: bits depend on how many rows a step has; use "
            "'fast'",
            field="numerics",
        )
    check_speculative(config.speculative, num_labels=num_labels)
