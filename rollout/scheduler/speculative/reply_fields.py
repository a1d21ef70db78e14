"""What replies say of speculative decoding: keys of SGLang's meta_info.

SGLang calls the counts `spec_num_correct_drafts` and `spec_num_proposed_drafts`; they were
`spec_accept_token_num` and `spec_draft_token_num`, which slime and miles read. Both are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.protocol import Request, SpecCounts
from rollout.scheduler.speculative.reasons import why_undrafted


def spec_meta(counts: SpecCounts | None, request: Request) -> dict[str, Any]:
    """The keys for one sequence; none of a server that drafts nothing. Replies call this with the
    counts of their last output.

    spec_off: the field of the request that lets nothing be drafted for it. synthetic: acceptance
    was forced, so the tokens mean nothing.
    """
    if counts is None:
        return {}
    found = _keys(counts)
    field = why_undrafted(request)
    if field:
        found["spec_off"] = field
    return found


def joined_spec_meta(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The keys for a reply in parts, from the meta_info of each: what its servers drafted
    together."""
    told = [part for part in parts if "spec_verify_ct" in part]
    if not told:
        return {}
    return _keys(
        SpecCounts(
            verifies=sum(part["spec_verify_ct"] for part in told),
            drafted=sum(part["spec_num_proposed_drafts"] for part in told),
            accepted=sum(part["spec_num_correct_drafts"] for part in told),
            synthetic=any(part.get("synthetic", False) for part in told),
        )
    )


def _keys(counts: SpecCounts) -> dict[str, Any]:
    verifies, drafted, accepted = counts.verifies, counts.drafted, counts.accepted
    found: dict[str, Any] = {
        "spec_verify_ct": verifies,
        "spec_num_proposed_drafts": drafted,
        "spec_num_correct_drafts": accepted,
        "spec_draft_token_num": drafted,
        "spec_accept_token_num": accepted,
    }
    if verifies:
        # Tokens of a step that verified drafts: the accepted ones and the one behind them.
        found["spec_accept_length"] = 1 + accepted / verifies
        found["spec_accept_rate"] = accepted / drafted
    if counts.synthetic:
        found["synthetic"] = True
    return found
