"""Where the routes of a step go, if anybody wants them.

Legend: T rows of the step, K experts of a token.
"""

from __future__ import annotations

from typing import Protocol

import torch


class RouteSink(Protocol):
    """Takes the experts that each row of a step was sent to, layer by layer."""

    def take(self, layer_index: int, ids_TK: torch.Tensor) -> None:
        """Called once for each layer of experts, in the order of layers, on the stream of the step.

        layer_index: among all layers of the model. ids_TK: int32, experts of the whole model from
        the highest score down, the same on every rank; -1 in rows that only fill a graph. It is
        read in stream order and may be overwritten after the step.
        """
        ...
