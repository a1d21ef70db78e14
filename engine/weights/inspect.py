"""Looking at the weights themselves: checksums, a snapshot to compare with, single values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from engine.errors import InvalidRequest, ManifestMismatch, UpdateOrder
from engine.parallel.mesh import Mesh
from engine.protocol import CheckAction, WeightsReport
from engine.weights.checksum import stored_checksums
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
        self._rank = mesh.rank
        self._require_weights = require_weights
        self._snapshot: dict[str, list[torch.Tensor]] = {}

    def check(self, action: CheckAction) -> WeightsReport:
        """See `CheckWeights`. Raises UpdateOrder for a comparison without a snapshot, and for a
        reset while an update is open. A reset leaves a session that refuses to serve."""
        self._require_weights()
        match action:
            case "checksum":
                sums = stored_checksums(self._stored())
                return WeightsReport(rank=self._rank, checksums=sums)
            case "layout":
                layout = {name: self._catalog.layout(name) for name in self._catalog.names}
                return WeightsReport(rank=self._rank, layout=layout)
            case "snapshot":
                self._snapshot = {
                    name: [view.to("cpu", copy=True) for view in views]
                    for name, views in self._stored()
                }
            case "reset_tensors":
                self._scramble()
            case "compare":
                return WeightsReport(rank=self._rank, differing=self._differing())
        return WeightsReport(rank=self._rank)

    def values(self, name: str, count: int) -> WeightsReport:
        """The first `count` values of a unit that this rank holds, row by row; none where it
        holds nothing of it. Raises InvalidRequest."""
        self._require_weights()
        if count < 0:
            raise InvalidRequest(f"{count} is no number of elements", field="count")
        try:
            none = self._catalog.values(name, 0)
        except ManifestMismatch as error:
            raise InvalidRequest(error.message, field="name") from None
        if none is None:
            return WeightsReport(rank=self._rank)
        row = max(math.prod(none.shape[1:]), 1)
        values = self._catalog.values(name, -(-count // row))
        assert values is not None, "it holds the unit"
        return WeightsReport(
            rank=self._rank, values=values.reshape(-1)[:count].float().cpu().tolist()
        )

    def _stored(self) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
        for name in self._catalog.names:
            yield name, self._catalog.views(name)

    def _scramble(self) -> None:
        self._session.require_none_open("reset_tensors")
        self._session.invalidate(SCRAMBLED)
        for index, (_, views) in enumerate(self._stored()):
            for view in views:
                generator = torch.Generator(device=view.device)
                generator.manual_seed(index)
                _fill_with_noise(view, generator)

    def _differing(self) -> list[str]:
        if not self._snapshot:
            raise UpdateOrder(
                "there is no snapshot to compare with; take one first", field="action"
            )
        return [
            name
            for name, views in self._stored()
            if not all(map(torch.equal, (view.cpu() for view in views), self._snapshot[name]))
        ]


def _fill_with_noise(view: torch.Tensor, generator: torch.Generator) -> None:
    if view.is_floating_point():
        view.normal_(generator=generator)
    else:
        view.random_(generator=generator)
