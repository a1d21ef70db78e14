"""Folders as runs leave them, written by the recipes' own writer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from engine.protocol import VersionSpan
from recipes.run.kept_rollouts import rollout_lines
from recipes.run.run_folder import RunFolder
from recipes.types import Group
from tests.helpers.trajectories import random_groups

BYTES = {0: b"<eos>", 1: b"one ", 2: b"two ", 3: b"\xe2\x82", 4: b"\xac"}
"""Of a vocabulary in which tokens 3 and 4 are a character."""


def groups_of(step: int, num: int = 2, samples: int = 4) -> list[Group]:
    """Groups with texts, and two versions in each reply of more than one token."""
    made = random_groups(num, samples, vocab=5, seed=step)
    for index, group in enumerate(made):
        replies = []
        for place, reply in enumerate(group.trajectories):
            length = len(reply.response_ids)
            spans = [VersionSpan(step - 1, 0, 1), VersionSpan(step, 1, length)]
            text = f"Reply {place} of step {step}"
            spans = spans[: 1 + (length > 1)]
            replies.append(dataclasses.replace(reply, text=text, spans=tuple(spans)))
        made[index] = dataclasses.replace(group, trajectories=tuple(replies))
    return made


def row_of(step: int, **figures: float) -> dict[str, float]:
    """A row of metrics.jsonl."""
    return {
        "step": step,
        "reward": step / 10,
        "weight_version": float(step),
        "timing_s/generate": 2.0,
        "timing_s/train": 1.0,
        "timing_s/step": 3.0,
        **figures,
    }


def write_steps(folder: RunFolder, steps: range, *, num: int = 2, samples: int = 4) -> None:
    """Add steps to a run's files."""
    for step in steps:
        groups = groups_of(step, num, samples)
        folder.append_metrics(row_of(step))
        folder.append_samples(step, groups)
        folder.append_rollouts(rollout_lines(step, groups, BYTES, num=num))


def run_folder(path: Path, steps: int = 3) -> RunFolder:
    """A run of some steps, of 10, that measured the model before the first."""
    folder = RunFolder(path)
    folder.write_config({"task": "largest", "model": "/models/tiny.gguf", "steps": 10})
    folder.append_evaluation({"step": 0, "eval/accuracy": 0.25})
    write_steps(folder, range(1, steps + 1))
    return folder


def logprobs_of(group: Group) -> list[list[float]]:
    """Of each reply, as they are kept."""
    return [np.round(t.rollout_logprobs.astype(float), 4).tolist() for t in group.trajectories]
