"""What `/metrics` of a server and of a router have when everything was counted."""

from __future__ import annotations

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from engine.protocol import CopyLoad
from rollout.metrics import Metrics
from rollout.router.metrics import RouterMetrics
from rollout.router.workers.worker import Worker
from tests.helpers.replicas import inline

Families = dict[str, tuple[str, frozenset[str]]]
"""Type and labels by name, a counter's with `_total`, as queries have it."""


def server_families() -> Families:
    """Those of a server with two copies of a model, and something that drafts."""
    with inline() as replica:
        state = replica.state()
    loads = dict.fromkeys(CopyLoad.__struct_fields__, 0)
    copies = [CopyLoad(**loads), CopyLoad(**loads)]
    state = replace(state, drafter="ngram", num_verified_rows=1, copies=copies)
    metrics = Metrics("m")
    times = {"started_at": 0.0, "first_at": 1.0, "queue_s": 0.5}
    metrics.finished("stop", **times, num_prompt=3, num_output=2)
    metrics.updated(1.0)
    return _families(metrics.render(state).decode())


def router_families() -> Families:
    """Those of a router with a worker, which did everything once."""
    metrics = RouterMetrics()
    metrics.answered(200)
    metrics.chose("prefix", num_hit=1, size=2)
    metrics.fanned_out(whole=True)
    worker = Worker("http://127.0.0.1:1", "w1", connect_s=1.0)
    return _families(metrics.render([worker]).decode())


def _families(text: str) -> Families:
    found: Families = {}
    for family in text_string_to_metric_families(text):
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        suffix = "_total" if family.type == "counter" else ""
        found[family.name.removesuffix("_total") + suffix] = family.type, frozenset(labels)
    return found
