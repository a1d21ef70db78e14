"""What a run is at now, as the figures above its charts."""

from __future__ import annotations

import math

from rollout.dashboard.figures import Figure, Tone, Unit
from rollout.dashboard.numbers import told
from rollout.dashboard.runs.run_config import RunConfig
from rollout.dashboard.runs.run_rows import Row

_MOST_MISMATCH = 0.015
"""Mean KL of engine and trainer, in nats a token, from which their difference is worth a look."""
_SHOWN: tuple[tuple[str, str, Unit, str], ...] = (
    ("reward", "Reward", "", "Mean of the last step's replies."),
    ("loss", "Loss", "", "Of the last step."),
    ("eval/loss", "Held-out loss", "nats", "Of the last evaluation."),
    ("eval/accuracy", "Held out", "", "Mean reward of greedy replies to held-out problems."),
    ("entropy", "Entropy", "nats", "Of the distribution of a token."),
    ("rollout_corr/k3_kl", "Mismatch, k3", "nats", "KL of what the engine samples from what the "
     "trainer computes."),
    ("async/staleness_mean", "Staleness", "", "Versions that the mean token is behind."),
    ("completions/mean_length", "Reply length", "tokens", "Mean of the last step."),
    ("perf/rollout_tokens_per_s", "Generated", "tokens/s", "While the last step sampled."),
    ("timing_s/step", "A step", "s", "Wall time of the last one."),
    ("weight_version", "Weight version", "", "That the engine serves."),
    ("rewards/failed_share", "Without a grade", "share", "Replies that could not be graded."),
)  # fmt: skip
_LOSS_IS_SHOWN_OF = "eval/loss"


def figures_of(rows: list[Row], config: RunConfig, num_unread: int) -> list[Figure]:
    """The last known value of each figure that the run has."""
    last = _last_values(rows)
    figures = [_step(rows, config)]
    for name, label, unit, hint in _SHOWN:
        if name not in last or (name == "loss" and _LOSS_IS_SHOWN_OF not in last):
            continue
        value = last[name]
        if name == "eval/accuracy":
            hint = f"{hint} {_best(rows)}"
        figures.append(
            Figure(
                name=name,
                label=label,
                value=told(value),
                unit=unit,
                hint=hint,
                tone=_tone(name, value),
            )
        )
    if num_unread:
        hint = "Lines of metrics.jsonl or evaluations.jsonl that are no row of a run."
        figures.append(
            Figure(name="unread", label="Unread lines", value=num_unread, tone="warn", hint=hint)
        )
    return figures


def _last_values(rows: list[Row]) -> dict[str, float]:
    """Figures of the last step that was taken, and of the last evaluation."""
    step = next((row.figures for row in reversed(rows) if row.taken), {})
    evaluated = (row.figures for row in reversed(rows) if any(map(_is_measure, row.figures)))
    measures = {name: value for name, value in next(evaluated, {}).items() if _is_measure(name)}
    return {**step, **measures}


def _is_measure(name: str) -> bool:
    return name.startswith("eval/")


def _step(rows: list[Row], config: RunConfig) -> Figure:
    step = rows[-1].step if rows else 0.0
    value = f"{step:g} of {config.steps}" if config.steps else f"{step:g}"
    return Figure(name="step", label="Step", value=value, hint="Optimizer steps that are taken.")


def _best(rows: list[Row]) -> str:
    measured = [(row.figures.get("eval/accuracy", math.nan), row.step) for row in rows]
    finite = [pair for pair in measured if math.isfinite(pair[0])]
    if not finite:
        return ""
    value, step = max(finite, key=lambda pair: pair[0])
    return f"The best so far is {value:.3f}, after step {step:g}."


def _tone(name: str, value: float) -> Tone:
    if not math.isfinite(value):
        return "bad"
    if name == "rewards/failed_share":
        return "warn" if value > 0 else "plain"
    if name == "rollout_corr/k3_kl":
        return "warn" if value > _MOST_MISMATCH else "plain"
    return "plain"
