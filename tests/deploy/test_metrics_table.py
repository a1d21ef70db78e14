"""The tables of metrics in docs/operations.md, and the dashboard, against what is served."""

from __future__ import annotations

import json
import re

from tests.helpers.children import ROOT
from tests.helpers.served_metrics import Families, router_families, server_families

_ROW = re.compile(r"^\| `([\w:]+)` \| (\w+) \| ([^|]*) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
_NAME = re.compile(r"\b(slipstream_\w+|vllm:\w+)")
_LABEL = re.compile(r"(?:by \((\w+)\)|{{(\w+)}}|{(\w+)=~)")
_FIXED = {"instance", "le"}
"""Labels that Prometheus and histograms bring."""


def served() -> Families:
    return {**server_families(), **router_families()}


def queries() -> list[tuple[str, str]]:
    """Expression and legend of every target of every panel."""
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    variables = [(v["definition"], "") for v in board["templating"]["list"] if "definition" in v]
    return [(target["expr"], target["legendFormat"]) for target in targets] + variables


def test_the_tables_have_every_metric_with_its_type_and_labels() -> None:
    found: Families = {}
    for name, kind, labels, unit, meaning in _ROW.findall(
        (ROOT / "docs" / "operations.md").read_text()
    ):
        assert name not in found, f"{name} stands twice"
        assert unit.strip() and meaning.strip()
        found[name] = kind, frozenset(re.findall(r"`(\w+)`", labels))
    assert found == served()


def test_names_say_their_unit_as_prometheus_has_it() -> None:
    for name, (kind, _) in served().items():
        assert (kind == "counter") == name.endswith("_total"), name
        assert not re.search(r"_(s|ms|secs|sec|mib|kb)$", name), name


def test_every_query_of_the_dashboard_names_metrics_that_are_served() -> None:
    known = served()
    for expression, _ in queries():
        for name in _NAME.findall(expression):
            plain = re.sub(r"_(bucket|sum|count)$", "", name)
            assert plain in known, f"{name} in {expression}"
            if known[plain][0] == "histogram":
                assert name != plain, f"{name} in {expression} is no sample of a histogram"
            elif known[plain][0] == "counter":
                assert f"rate({name}" in expression, f"{name} in {expression} only grows"


def test_its_queries_and_legends_use_labels_that_are_there() -> None:
    known = served()
    for expression, legend in queries():
        names = [re.sub(r"_(bucket|sum|count)$", "", n) for n in _NAME.findall(expression)]
        labels = set.intersection(*(set(known[name][1]) for name in names)) | _FIXED
        told = {a or b or c for a, b, c in _LABEL.findall(f"{expression} {legend}")}
        assert told <= labels, expression


def test_each_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {n for expression, _ in queries() for n in _NAME.findall(expression)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    ours = {name for name in served() if name.startswith("slipstream_")}
    assert ours - shown == {"slipstream_verify_steps_total"}


def test_panels_do_not_lie_over_each_other() -> None:
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text())
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in board["panels"]):
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
