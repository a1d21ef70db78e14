"""Small random batches of drafted rows, with every edge that lengths and limits have."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

VOCAB = 2
"""Few ids, so that drafts come true and repeat."""
NO_LIMIT = 2**31 - 1


@dataclass
class DraftedRows:
    """Tables of a rank and a batch over them; names as in `kernels.speculative`.

    The last slot is the scratch slot, whose tables say that it is inert.
    """

    token_ids: torch.Tensor
    length: torch.Tensor
    limit: torch.Tensor
    forced: torch.Tensor
    page_table: torch.Tensor
    page_size: int
    slots_R: torch.Tensor
    drafts_RK: torch.Tensor
    drafted_R: torch.Tensor
    tokens_V: torch.Tensor

    @property
    def scratch_slot(self) -> int:
        return len(self.length) - 1

    def to(self, device: str) -> DraftedRows:
        """A copy on `device`."""
        moved = {
            name: value.clone().to(device) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return DraftedRows(**moved)


def drafted_rows(
    rng: random.Random, *, num_slots: int = 5, context: int = 10, num_drafts: int | None = None
) -> DraftedRows:
    """A batch of `num_slots` slots at most, some rows of it padding."""
    num_drafts = rng.choice([0, 1, 2, 3, 4, 7]) if num_drafts is None else num_drafts
    page_size = rng.choice([1, 3, 4])
    columns = -(-context // page_size)
    length = [rng.randint(0, context + 1) for _ in range(num_slots + 1)]
    limit = [_limit(rng, known, context) for known in length[:-1]] + [0]
    chosen = rng.sample(range(num_slots), rng.randint(0, num_slots))
    slots = chosen + [num_slots] * rng.randint(0, 2)
    pages = rng.sample(range(100 + num_slots), num_slots + 1)
    size = len(slots) * (num_drafts + 1)
    return DraftedRows(
        token_ids=_ids(rng, (num_slots + 1) * context).view(num_slots + 1, context),
        length=_ints(length),
        limit=_ints(limit),
        forced=torch.tensor([rng.choice([-1.0, -1.0, 0.0, 0.5, 1.0]) for _ in length]),
        page_table=_ints([[1000 * column + page for column in range(columns)] for page in pages]),
        page_size=page_size,
        slots_R=_ints(slots),
        drafts_RK=_ids(rng, len(slots) * num_drafts).view(len(slots), num_drafts),
        drafted_R=_ints([rng.randint(0, num_drafts) for _ in slots]),
        tokens_V=_ids(rng, size).long(),
    )


def _limit(rng: random.Random, known: int, context: int) -> int:
    """Reached, within the next tokens, at the end of the context, or none."""
    near = [known + more for more in range(5)]
    return rng.choice([0, max(known - 1, 0), *near, context, context + 1, NO_LIMIT])


def _ids(rng: random.Random, count: int) -> torch.Tensor:
    return _ints([rng.randrange(VOCAB) for _ in range(count)])


def _ints(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
