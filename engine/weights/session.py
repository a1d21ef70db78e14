"""The update transaction: begin -> receive -> verify -> commit, or abort.

States: closed -> (begin) -> open -> (commit) -> closed at the new version,
                                  -> (abort)  -> closed at the old version.

What is received is staged: held as it came, no live weight touched. Commit verifies that
the staged tensors are the model's tensors, then places them all through `load`, between two
steps. So a failed or dead update leaves the old version serving, and no step sees a mixture.
Tensors of this process are staged by reference, so an in-process update moves each byte once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from engine.errors import ManifestMismatch, UpdateOrder, WeightUpdateError
from engine.protocol import BeginUpdate, TensorSpec, UpdateReport
from engine.weights.load import Loadable, Placer, load


@dataclass
class OpenUpdate:
    """An update between begin and commit."""

    begin: BeginUpdate
    announced: dict[str, TensorSpec]
    started: float
    staged: dict[str, torch.Tensor] = field(default_factory=dict)


class UpdateSession:
    """Owner of the weight version and of the open update of one rank."""

    def __init__(self, model: Loadable, *, version: int) -> None:
        self._model = model
        self._version = version
        self._open: OpenUpdate | None = None
        self._last: UpdateReport | None = None
        self._broken: str | None = None

    @property
    def version(self) -> int:
        """The version that serves."""
        return self._version

    def load_initial(self, source: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill the fresh model. Raises ManifestMismatch naming the tensor."""
        load(self._model, source)

    def require_servable(self) -> None:
        """Raise WeightUpdateError when a commit died while it was writing."""
        if self._broken is not None:
            raise WeightUpdateError(self._broken, field="version")

    def begin(self, command: BeginUpdate) -> None:
        """Open the update to `command.version`; a repeated begin of the same is no error.

        Raises UpdateOrder when another update is open or the version does not go forward,
        ManifestMismatch when the manifest is not of this model.
        """
        if self._open is not None:
            if self._open.begin == command and not self._open.staged:
                return
            raise UpdateOrder(
                f"update to version {self._open.begin.version} is open; commit or abort it "
                f"before beginning {command.version}",
                field="version",
            )
        if command.version <= self._version:
            raise UpdateOrder(
                f"version {command.version} does not go forward: {self._version} serves now",
                field="version",
            )
        announced = _announced(command.manifest)
        placer = Placer(self._model)
        for spec in command.manifest:
            placer.check(spec.name, tuple(spec.shape))
        if announced and not command.partial:
            self._require_all(announced)
        self._open = OpenUpdate(command, announced, time.perf_counter())

    def receive(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Stage tensors of the open update; may be called once a bucket.

        Raises ManifestMismatch for a tensor the model or the manifest does not have, one that
        came before, or one of another shape or dtype. The update stays open: abort it.
        """
        update = self._require_open("receive")
        placer = Placer(self._model)
        for name, tensor in tensors:
            if name in update.staged:
                raise ManifestMismatch(f"{name} came twice", field=name)
            _check_against_manifest(update, name, tensor)
            placer.check(name, tuple(tensor.shape))
            update.staged[name] = tensor

    def commit(self, version: int) -> UpdateReport:
        """Verify and place the staged tensors; `version` serves from the next step on.

        Committing the version that serves already returns its report again.
        Raises UpdateOrder, or ManifestMismatch when tensors are missing; nothing was written.
        """
        if self._open is None and self._last is not None and self._last.version == version:
            return self._last
        update = self._require_open("commit")
        if update.begin.version != version:
            raise UpdateOrder(
                f"the open update is to version {update.begin.version}, not {version}",
                field="version",
            )
        self._verify(update)
        report = self._place(update)
        self._version, self._open, self._last = version, None, report
        return report

    def abort(self, version: int) -> None:
        """Drop the open update; no error when there is none. Raises UpdateOrder for another's."""
        if self._open is None:
            return
        if self._open.begin.version != version:
            raise UpdateOrder(
                f"the open update is to version {self._open.begin.version}, not {version}",
                field="version",
            )
        self._open = None

    def _require_open(self, what: str) -> OpenUpdate:
        if self._open is None:
            raise UpdateOrder(f"{what} without an open update; begin one", field="version")
        return self._open

    def _require_all(self, names: Mapping[str, object]) -> None:
        aliases = self._model.aliases()
        covered = {aliases.get(name, name) for name in names}
        missing = [name for name in self._model.weight_index() if name not in covered]
        if missing:
            rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ManifestMismatch(
                f"{missing[0]}{rest} missing; send every tensor, or begin with partial=True",
                field=missing[0],
            )

    def _verify(self, update: OpenUpdate) -> None:
        for name in update.announced:
            if name not in update.staged:
                raise ManifestMismatch(f"{name} was announced and did not come", field=name)
        if not update.begin.partial:
            self._require_all(update.staged)
        for alias, name in self._model.aliases().items():
            tied = update.staged.get(alias), update.staged.get(name)
            if tied[0] is not None and tied[1] is not None and not torch.equal(tied[0], tied[1]):
                raise ManifestMismatch(
                    f"{alias} differs from {name}: this model ties the two", field=alias
                )

    def _place(self, update: OpenUpdate) -> UpdateReport:
        self._broken = (
            f"the commit of version {update.begin.version} died while writing; the weights are "
            "a mixture. Publish a whole version to serve again"
        )
        placed = load(self._model, self._untied(update.staged), partial=True)
        self._broken = None
        return UpdateReport(
            version=update.begin.version,
            num_tensors=placed.num_tensors,
            num_bytes=placed.num_bytes,
            seconds=time.perf_counter() - update.started,
        )

    def _untied(self, staged: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Staged tensors without the second name of a tied one, which `_verify` compared."""
        aliases = self._model.aliases()
        return [
            (name, tensor)
            for name, tensor in staged.items()
            if not (name in aliases and aliases[name] in staged)
        ]


def _announced(manifest: list[TensorSpec]) -> dict[str, TensorSpec]:
    announced: dict[str, TensorSpec] = {}
    for spec in manifest:
        if spec.name in announced:
            raise ManifestMismatch(f"{spec.name} is announced twice", field=spec.name)
        announced[spec.name] = spec
    return announced


def _check_against_manifest(update: OpenUpdate, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ManifestMismatch(f"{name} has dtype {tensor.dtype}, not a float", field=name)
    if not update.announced:
        return
    spec = update.announced.get(name)
    if spec is None:
        raise ManifestMismatch(f"{name} was not announced in the manifest", field=name)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype or list(tensor.shape) != list(spec.shape):
        raise ManifestMismatch(
            f"{name} came as {dtype} {list(tensor.shape)}, announced was "
            f"{spec.dtype} {list(spec.shape)}",
            field=name,
        )
