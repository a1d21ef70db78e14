"""The end of an update on one rank: what came is verified, then placed."""

from __future__ import annotations

import time

import torch

from engine.protocol import UpdateReport
from engine.transfer import wait_for
from engine.weights import verify
from engine.weights.catalog import Catalog
from engine.weights.digest import digest_of_whole
from engine.weights.staging import OpenUpdate
from engine.weights.torn import TornWeights


def verify_all(update: OpenUpdate, catalog: Catalog, torn: TornWeights, *, placing: bool) -> None:
    """Raise what speaks against placing all that came; sets the digest of an update that is fit.

    placing: whether `place` is next. Else a later call, before it is, verifies nothing twice but
    what the trainer may have changed since.
    """
    # Other engines may keep a fleet between its two phases for long: what was lent is read
    # again before it is placed. In one phase the read beside steps was a moment ago.
    again = frozenset(update.lent if placing and update.digest is not None else ())
    if again:
        verify.require_bits(update, catalog, catalog.device, again=again, only=again)
    elif update.digest is None:
        verify.require_complete(update, catalog, torn.versions)
        verify.require_bits(update, catalog, catalog.device)
        update.keep(update.staged, catalog)
        update.digest = digest_of_whole(update.names)


def place(update: OpenUpdate, catalog: Catalog, torn: TornWeights) -> UpdateReport:
    """Write what came into the live weights, where it does not lie already; returns once that
    is done. Until the caller mends `torn`, the rank refuses to step."""
    staged = _untied(update.staged, catalog)
    names = catalog.written(staged)
    torn.tear(
        names,
        update.version,
        f"the commit of version {update.version} died while writing; the weights are a "
        "mixture. Commit it again, or publish a whole version, to serve again",
    )
    update.keep(names, catalog)
    num_bytes = update.placed_bytes + catalog.place(staged, update.excerpts)
    # The sender may change what it lent, and staged memory goes back, once this returns.
    wait_for(catalog.device)
    return UpdateReport(
        version=update.version,
        num_tensors=len(catalog.covered(update.names)),
        num_bytes=num_bytes,
        seconds=time.monotonic() - update.started,
    )


def _untied(staged: dict[str, torch.Tensor], catalog: Catalog) -> dict[str, torch.Tensor]:
    """Staged tensors without the second name of a tied one, which were compared."""
    twins = {n for n, other in catalog.aliases.items() if n in staged and other in staged}
    return {name: tensor for name, tensor in staged.items() if name not in twins}
