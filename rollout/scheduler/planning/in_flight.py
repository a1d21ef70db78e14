"""Steps that were planned and have not come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.protocol import IntArray
from rollout.scheduler.routes.kept import KeptRoutes

UidArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A planned step whose result has not come.

    version: weights it runs under. slots, uids: [S], the rows that sample, in row order;
    a row whose slot has another uid by then left meanwhile, and its token is dropped.
    row_slots, row_uids: [R], all rows. scored: slots that end without sampling.
    draft_lens: int32 [S], as in the plan; None where it has none, so that each row gets one token.
    routes: whose routes it reads, in the order of its reads.
    """

    step: int
    version: int
    slots: IntArray
    uids: UidArray
    row_slots: IntArray
    row_uids: UidArray
    scored: list[int] = field(default_factory=list)
    draft_lens: IntArray | None = None
    routes: list[KeptRoutes] = field(default_factory=list)
