"""The figures of earlier runs, found by machine, model and workload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def model_name(model: str) -> str:
    """What files call a model: the name of its file or folder, without the way there."""
    path = Path(model)
    return path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")


def previous_figures(
    source: Path, *, machine: str, model: str, workload: str, quantization: str = "none"
) -> tuple[str, dict[str, Any]] | None:
    """The newest figures of a workload: (file name, figures), None if there are none.

    source: a JSON file that `gpu_rollout.py` wrote, or a folder of them; others are passed
    over. Files without a date are older than all with one.
    """
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    found = []
    for file in files:
        report = json.loads(file.read_text())
        if not isinstance(report, dict) or report.get("machine") != machine:
            continue
        figures = report.get("workloads", {})
        if report.get("options", {}).get("quantization", "none") != quantization:
            continue
        if model_of(report) == model_name(model) and workload in figures:
            found.append((report.get("date", ""), file.name, figures[workload]))
    if not found:
        return None
    _, name, figures = max(found, key=lambda entry: entry[:2])
    return name, figures


def model_of(report: dict[str, Any]) -> str:
    """The model that a report is about."""
    return model_name(report.get("options", {}).get("model", ""))
