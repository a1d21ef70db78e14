"""Looking at the weights themselves: checksums, a snapshot to compare with, single values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.errors import InvalidRequest, ManifestMismatch, UpdateOrder
from engine.parallel.mesh import Mesh
from engine.protocol import CheckAction, WeightsReport
from engine.weights.checksum import checksums
from engine.weights.session import UpdateSession

SCRAMBLED = (
    "the weights were overwritten with noise (reset_tensors): publish a whole version (an update "
    "that is not partial) to serve again"
)


class WeightInspector:
    """Answers `CheckWeights` and `GetWeight` for one rank, by Hugging Face name."""

    def __init__(
        self, session: UpdateSession, mesh: Mesh, require_weights: Callable[[], None]
    ) -> None:
        self._session = session
        self._catalog = session.catalog
        self._rank = mesh.tp_rank
        self._require_weights = require_weights
        self._snapshot: dict[str, torch.Tensor] = {}

    def check(self, action: CheckAction) -> WeightsReport:
        """See `CheckWeights`. Raises UpdateOrder for a comparison without a snapshot, and for a
        reset while an update is open. A reset leaves a session that refuses to serve."""
        self._require_weights()
        match action:
            case "checksum":
                return WeightsReport(rank=self._rank, checksums=checksums(self._tensors().items()))
            case "snapshot":
                self._snapshot = {n: t.to("cpu", copy=True) for n, t in self._tensors().items()}
            case "reset_tensors":
                self._scramble()
            case "compare":
                return WeightsReport(rank=self._rank, differing=self._differing())
        return WeightsReport(rank=self._rank)

    def values(self, name: str, count: int) -> WeightsReport:
        """The first `count` elements of a tensor, row by row. Raises InvalidRequest."""
        self._require_weights()
        if count < 0:
            raise InvalidRequest(f"{count} is no number of elements", field="count")
        try:
            tensor = self._catalog.view(name)
        except ManifestMismatch as error:
            raise InvalidRequest(error.message, field="name") from None
        rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
        needed = rows[: -(-count // max(rows.shape[1], 1))]
        return WeightsReport(
            rank=self._rank, values=needed.reshape(-1)[:count].float().cpu().tolist()
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: self._catalog.view(name) for name in self._catalog.names}

    def _scramble(self) -> None:
        self._session.require_none_open("reset_tensors")
        self._session.invalidate(SCRAMBLED)
        for index, tensor in enumerate(self._tensors().values()):
            generator = torch.Generator(device=tensor.device)
            generator.manual_seed(index)
            tensor.normal_(generator=generator)

    def _differing(self) -> list[str]:
        if not self._snapshot:
            raise UpdateOrder(
                "there is no snapshot to compare with; take one first", field="action"
            )
        return [
            name
            for name, tensor in self._tensors().items()
            if not torch.equal(tensor.cpu(), self._snapshot[name])
        ]
