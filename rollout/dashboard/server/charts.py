"""The charts of a server."""

from __future__ import annotations

from engine.protocol import ReplicaState
from rollout.dashboard.figures import Chart, Line


def charts(state: ReplicaState) -> list[Chart]:
    """Those that a server with this state draws; the columns are those of `rates.row`."""
    found = [
        Chart(
            name="throughput",
            title="Throughput",
            unit="tokens/s",
            lines=[
                Line(name="generated", label="generated"),
                Line(name="prefilled", label="prompt, computed"),
            ],
            hint="Tokens a second. Prompt tokens that the cache had are not computed.",
        ),
        Chart(
            name="queue",
            title="Requests",
            unit="requests",
            lines=[
                Line(name="running", label="running"),
                Line(name="waiting", label="waiting"),
            ],
            hint="Sequences in the batch, and sequences that wait.",
        ),
        Chart(
            name="kv",
            title="KV memory",
            unit="share",
            stacked=True,
            lines=[
                Line(name="kv_held", label="held by requests"),
                Line(name="kv_cached", label="cached prefixes"),
            ],
            hint="Pages of the pool. Cached prefixes make room when others need it.",
        ),
        Chart(
            name="hits",
            title="Prefix cache hits",
            unit="share",
            lines=[Line(name="cache_hits", label="of the prompt tokens")],
            hint="Share of each second's prompt tokens that the cache had.",
        ),
    ]
    if state.draft_tokens:
        found.append(
            Chart(
                name="drafts",
                title="Drafts accepted",
                unit="share",
                lines=[Line(name="accepted", label="of the drafted tokens")],
                hint="Share of each second's drafted tokens that the model kept.",
            )
        )
    return found
