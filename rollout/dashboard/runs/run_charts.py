"""The charts of a run: which figures of its rows are drawn together, and what they are called.

Names of figures follow `recipes/run/report.py` and `recipes/trainers/metrics.py`, which follow
TRL's and verl's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from rollout.dashboard.figures import Chart, Line, Unit

_DIFFERENCE = "sampling/sampling_logp_difference"


def _chart(name: str, title: str, hint: str, lines: dict[str, str], unit: Unit = "") -> Chart:
    drawn = [Line(name=column, label=label) for column, label in lines.items()]
    return Chart(name=name, title=title, hint=hint, lines=drawn, unit=unit)


_FIRST = (
    _chart(
        "reward",
        "Reward",
        "Mean reward of a step's replies, and of greedy replies to held-out problems.",
        {"reward": "sampled", "eval/accuracy": "held out"},
    ),
    _chart(
        "loss",
        "Loss",
        "What the optimizer lowers; of a supervised run in nats a token.",
        {"loss": "training", "eval/loss": "held out"},
    ),
)
_REST = (
    _chart(
        "mismatch",
        "Train/rollout mismatch, k3",
        "KL of what the engine samples from what the trainer computes: an estimate above 0.",
        {"rollout_corr/k3_kl": "k3"},
        "nats",
    ),
    _chart(
        "mismatch_k1",
        "Train/rollout mismatch, k1",
        "Mean difference of the logprobs of engine and trainer: its sign says who is surer.",
        {"rollout_corr/kl": "k1"},
        "nats",
    ),
    _chart(
        "difference",
        "Difference of logprobs",
        "Between engine and trainer, of the tokens that the current weights sampled.",
        {f"{_DIFFERENCE}/mean": "mean", f"{_DIFFERENCE}/max": "largest"},
        "nats",
    ),
    _chart(
        "staleness",
        "Staleness",
        "Versions between the weights that sampled a token, or a reply's first, and those that "
        "learn from it.",
        {
            "async/staleness_mean": "token, mean",
            "async/staleness_max": "token, largest",
            "async/age_mean": "reply, mean",
            "async/age_max": "reply, largest",
        },
    ),
    _chart("entropy", "Entropy", "Of the distribution of a token.", {"entropy": "mean"}, "nats"),
    _chart(
        "length",
        "Reply length",
        "Tokens of a step's replies.",
        {"completions/mean_length": "mean", "completions/max_length": "longest"},
        "tokens",
    ),
    _chart(
        "spread",
        "Groups without anything to learn",
        "Share of groups whose replies all earn the same; with none right; and of replies cut off.",
        {
            "frac_reward_zero_std": "all the same",
            "frac_groups_all_wrong": "none right",
            "completions/clipped_ratio": "replies cut off",
        },
        "share",
    ),
    _chart(
        "speed",
        "Generated",
        "Tokens that the engine sampled in a second of its phase.",
        {"perf/rollout_tokens_per_s": "tokens a second"},
        "tokens/s",
    ),
    _chart("version", "Weight version", "Served after a step.", {"weight_version": "version"}),
    _chart("push", "Weight update", "Time to publish the weights.", {"push/seconds": "push"}, "s"),
    _chart("kl", "KL", "From the reference, or from the teacher.", {"kl": "k1", "teacher_kl": "t"}),
    _chart(
        "critic",
        "Critic",
        "Share of the variance of returns that it foresaw, and of values that were clipped.",
        {"critic/vf_explained_var": "explained", "critic/vf_clipfrac": "clipped"},
        "share",
    ),
    _chart(
        "drafts",
        "Drafts",
        "Share of drafted tokens that were right.",
        {"speculative/accept_rate": "accepted"},
        "share",
    ),
    _chart("gradient", "Gradient norm", "Before it is clipped.", {"grad_norm": "norm"}),
    _chart("rate", "Learning rate", "Of the step's update.", {"learning_rate": "rate"}),
    _chart(
        "failed",
        "Replies without a grade",
        "Share of a step's replies that could not be graded.",
        {"rewards/failed_share": "failed"},
        "share",
    ),
)

PHASE = "timing_s/"
_NO_PHASE = frozenset({"timing_s/step", "timing_s/eval"})
_LAG = "async/lag_share/"
_SET = re.compile(r"eval/(?P<set>[^/]+)/(?P<figure>accuracy|reward|avg@\d+|pass@\d+)")


def charts_of(columns: Collection[str]) -> list[Chart]:
    """Those that some row has a figure of, with the lines that there are."""
    drawn = [*_FIRST, _sets(columns), _ledger(columns), *_REST, _lags(columns)]
    return [chart for each in drawn if (chart := _with_lines(each, columns)) is not None]


def columns_of(charts: list[Chart]) -> list[str]:
    """What the charts draw."""
    return list(dict.fromkeys(line.name for chart in charts for line in chart.lines))


def phases(columns: Collection[str]) -> list[str]:
    """Columns of the time ledger, which add up to the step."""
    return [name for name in columns if name.startswith(PHASE) and name not in _NO_PHASE]


def _with_lines(chart: Chart, columns: Collection[str]) -> Chart | None:
    lines = [line for line in chart.lines if line.name in columns]
    if not lines:
        return None
    return Chart(
        name=chart.name,
        title=chart.title,
        lines=lines,
        unit=chart.unit,
        stacked=chart.stacked,
        hint=chart.hint,
    )


def _ledger(columns: Collection[str]) -> Chart:
    lines = [Line(name=name, label=name.removeprefix(PHASE)) for name in phases(columns)]
    return Chart(
        name="ledger",
        title="Time of a step",
        lines=lines,
        unit="s",
        stacked=True,
        hint="Where the seconds of each step went, by phase.",
    )


def _lags(columns: Collection[str]) -> Chart:
    found = sorted((c for c in columns if c.startswith(_LAG)), key=lambda c: (len(c), c))
    return Chart(
        name="lags",
        title="Tokens by staleness",
        lines=[Line(name=name, label=f"{name.removeprefix(_LAG)} behind") for name in found],
        unit="share",
        stacked=True,
        hint="Share of a step's tokens by how many versions ago they were sampled.",
    )


def _sets(columns: Collection[str]) -> Chart:
    """Held-out figures beside the accuracy of the first set."""
    return Chart(
        name="sets",
        title="Held out, by set",
        lines=[Line(name=name, label=label) for name, label in _set_lines(columns)],
        hint="Accuracy of every set of problems, and the figures of several replies to each.",
    )


def _set_lines(columns: Collection[str]) -> Iterator[tuple[str, str]]:
    found = [(name, _SET.fullmatch(name)) for name in columns]
    lines = [(name, f"{m['set']} {m['figure']}") for name, m in found if m is not None]
    # One is what the chart of the reward shows.
    yield from lines if len(lines) > 1 else ()
