"""Small random batches to draft for, with sources of every kind, and n-gram drafts by a loop."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import torch

NO_LIMIT = 2**31 - 1


@dataclass
class NgramRows:
    """Arguments of `kernels.speculative.ngram.propose`. The last slot is a scratch slot."""

    slots_R: torch.Tensor
    draft_lens_R: torch.Tensor
    length: torch.Tensor
    limit: torch.Tensor
    forced: torch.Tensor
    token_ids: torch.Tensor
    sources: torch.Tensor
    history: torch.Tensor
    segments: torch.Tensor
    drafts_RK: torch.Tensor
    drafted_R: torch.Tensor
    max_match: int
    min_match: int

    def to(self, device: str) -> NgramRows:
        """A copy on `device`."""
        moved = {
            name: value.clone().to(device) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return NgramRows(**moved)


def ngram_rows(
    rng: random.Random,
    *,
    num_slots: int = 4,
    context: int = 24,
    num_sources: int | None = None,
    vocab: int | None = None,
) -> NgramRows:
    """A batch of `num_slots` slots at most and some padding, over text of few different tokens."""
    vocab = rng.choice([1, 2, 3]) if vocab is None else vocab
    num_drafts = rng.choice([0, 1, 3, 7])
    num_sources = rng.choice([0, 1, 3, 6]) if num_sources is None else num_sources
    num_segments, num_history = rng.randint(0, 4), 2 * context
    sizes = [rng.randint(0, context) for _ in range(num_segments)]
    length = [rng.randint(0, context + 1) for _ in range(num_slots + 1)]
    limit = [_limit(rng, known, context) for known in length[:-1]] + [0]
    ids = [-1, *range(num_slots), *(-2 - segment for segment in range(num_segments))]
    slots = [
        *rng.sample(range(num_slots), rng.randint(0, num_slots)),
        *[num_slots] * rng.randint(0, 2),
    ]
    max_match = rng.choice([1, 2, 3, 5, 16])
    listed = [[rng.choice(ids) for _ in range(num_sources)] for _ in length]
    return NgramRows(
        slots_R=_ints(slots),
        draft_lens_R=_ints([rng.randint(0, num_drafts) for _ in slots]),
        length=_ints(length),
        limit=_ints(limit),
        forced=torch.tensor([rng.choice([-1.0, -1.0, -1.0, 0.0, 0.5]) for _ in length]),
        token_ids=_text(rng, vocab, len(length) * context).view(len(length), context),
        sources=_ints(listed).view(len(length), num_sources),
        history=_text(rng, vocab, num_history),
        segments=_ints([[rng.randint(0, num_history - size), size] for size in sizes]).view(-1, 2),
        drafts_RK=torch.full((len(slots), num_drafts), -7, dtype=torch.int32),
        drafted_R=torch.full((len(slots),), -7, dtype=torch.int32),
        max_match=max_match,
        min_match=rng.randint(1, min(max_match, 4)),
    )


def by_loop(case: NgramRows) -> tuple[list[list[int]], list[int]]:
    """`drafts_RK` and `drafted_R`, from the words of `propose` one by one."""
    context, num_drafts = case.token_ids.shape[1], case.drafts_RK.shape[1]
    all_drafts, all_drafted = [], []
    for row, slot in enumerate(case.slots_R.tolist()):
        known, most = int(case.length[slot]), min(int(case.limit[slot]), context + 1)
        asked = min(int(case.draft_lens_R[row]), num_drafts, max(most - known - 1, 0))
        asked = asked if known else 0
        text = case.token_ids[slot, :known].tolist()
        drafts = _drafts(case, text, _sources(case, slot))[:asked] if asked else []
        given = asked if case.forced[slot] >= 0 else len(drafts)
        all_drafts.append(drafts + [0] * (num_drafts - len(drafts)))
        all_drafted.append(given)
    return all_drafts, all_drafted


def _sources(case: NgramRows, slot: int) -> list[list[int]]:
    found = [case.token_ids[slot, : int(case.length[slot])].tolist()]
    for source in case.sources[slot].tolist():
        if source >= 0 and source != slot:
            found.append(case.token_ids[source, : int(case.length[source])].tolist())
        elif source <= -2:
            at, size = case.segments[-2 - source].tolist()
            found.append(case.history[at : at + size].tolist())
    return found


def _drafts(case: NgramRows, text: list[int], sources: list[list[int]]) -> list[int]:
    """All that follows the best match."""
    best = [_best(case, text, source) for source in sources]
    longest = max(length for length, _ in best)
    if not longest:
        return []
    tied = [
        source[stop:]
        for source, (length, stop) in zip(sources, best, strict=True)
        if length == longest
    ]
    votes = Counter(rest[0] for rest in tied)
    return next(rest for rest in tied if votes[rest[0]] == max(votes.values()))


def _best(case: NgramRows, text: list[int], source: list[int]) -> tuple[int, int]:
    """Length of a source's match and where it stops; (0, 0) for none."""
    best = (0, 0)
    for stop in range(1, len(source)):
        for length in range(case.min_match, case.max_match + 1):
            if length <= min(stop, len(text)) and source[stop - length : stop] == text[-length:]:
                best = max(best, (length, stop))
    return best


def _limit(rng: random.Random, known: int, context: int) -> int:
    near = [known + more for more in range(5)]
    return rng.choice([0, *near, context, context + 1, NO_LIMIT, NO_LIMIT, NO_LIMIT])


def _text(rng: random.Random, vocab: int, count: int) -> torch.Tensor:
    return _ints([rng.randrange(vocab) for _ in range(count)])


def _ints(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
