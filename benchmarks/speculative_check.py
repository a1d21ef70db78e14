"""What has to be right before `speculative.py` times anything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from speculative_engine import PLAIN, Bench, Draft, acceptance_for, expected_tau

from engine.protocol import RequestOutput, SpecCounts

ROWS, OUTPUT_TOKENS = 8, 96
MOST_FLIPS = 0.25
"""Share of the tokens that rounding may decide otherwise: 16-bit logits of random weights lie as
near to each other as that. Wrong drafts that are taken, or tokens in wrong places, differ at
nearly every token of so flat a law."""
LOGPROB_ATOL = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.1}


def check(bench: Bench, *, k: int, tau: float) -> dict[str, Any]:
    """Tokens with drafts are those without, and forced rows have the mean count that was asked
    for. Raises AssertionError; prints and returns what was seen."""
    found = _same_tokens(bench) | _forced_counts(bench, k, tau)
    print(
        f"check: {found['same']} tokens as without drafts, {found['flips']} of {found['rows']} "
        f"rows left them, {found['accepted']} drafts accepted of {found['drafted']}; forced tau "
        f"{found['forced_tau']:.3f} of {tau:.3f}",
        flush=True,
    )
    return found


def _same_tokens(bench: Bench) -> dict[str, Any]:
    facts = bench.executor.facts
    prompts = _repeating(facts.vocab_size)
    totals = {"rows": 0, "same": 0, "flips": 0, "drafted": 0, "accepted": 0}
    for temperature in (0.0, 0.2, 1.0):
        plain, drafts = (
            bench.run(
                bench.requests(
                    prompts, draft, max_new_tokens=OUTPUT_TOKENS, temperature=temperature, seed=1
                )
            )
            for draft in (PLAIN, Draft())
        )
        for without, with_drafts in zip(plain, drafts, strict=True):
            atol = LOGPROB_ATOL[facts.dtype] / (temperature or 1.0)
            same = _common(without, with_drafts, atol)
            spec = with_drafts.spec or SpecCounts()
            assert not spec.synthetic
            totals["rows"] += 1
            totals["same"] += same
            totals["flips"] += same < OUTPUT_TOKENS
            totals["drafted"] += spec.drafted
            totals["accepted"] += spec.accepted
    if not totals["drafted"]:
        print("check: no row repeated itself, so that no draft was verified")
    most = 0.0 if facts.dtype == "float32" else MOST_FLIPS
    assert totals["flips"] <= most * totals["same"], f"drafts change the tokens: {totals}"
    return totals


def _common(without: RequestOutput, with_drafts: RequestOutput, atol: float) -> int:
    """Tokens up to the first that differs; their logprobs have to be close."""
    assert len(without.token_ids) == len(with_drafts.token_ids) == OUTPUT_TOKENS
    differs = np.flatnonzero(without.token_ids != with_drafts.token_ids)
    same = int(differs[0]) if len(differs) else OUTPUT_TOKENS
    gap = np.abs(without.logprobs[:same] - with_drafts.logprobs[:same]).max(initial=0.0)
    assert gap <= atol, f"logprobs with drafts differ by {gap}"
    return same


def _forced_counts(bench: Bench, k: int, tau: float) -> dict[str, float]:
    prompts = _repeating(bench.executor.facts.vocab_size)
    draft = Draft(forced_acceptance=acceptance_for(tau, k))
    outputs = bench.run(bench.requests(prompts, draft, max_new_tokens=OUTPUT_TOKENS))
    counts = [output.spec for output in outputs if output.spec is not None]
    assert len(counts) == len(outputs) and all(count.synthetic for count in counts)
    verifies = sum(count.verifies for count in counts)
    found = 1 + sum(count.accepted for count in counts) / verifies
    # The last verify of a row has fewer drafts than k, and a count is at most k from its mean.
    slack = 5 * k / 2 / math.sqrt(verifies) + 2 * k * len(counts) / verifies
    wanted = expected_tau(draft.forced_acceptance, k)
    assert abs(found - wanted) <= slack, f"forced tau is {found}, {wanted} was asked for"
    return {"forced_tau": found}


def _repeating(vocab_size: int, period: int = 12, times: int = 5) -> list[np.ndarray]:
    """Prompts that say the same few tokens again and again, so that there is what to draft."""
    rng = np.random.default_rng(3)
    return [
        np.tile(rng.integers(0, vocab_size, period + row, dtype=np.int32), times)
        for row in range(ROWS)
    ]
