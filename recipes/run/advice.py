"""Why a run learns nothing, told while it happens: a pure function of its last steps.

Called by `Run.finish_step`; what comes back is shown to the user once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WINDOW = 5
"""Steps that are looked at."""
MOST = 0.9
"""Share of groups without spread from which a step has next to no gradient."""
SOLVED = 0.9
"""Mean reward from which groups agree because they are right."""
SKIPPED = "train/skipped_steps"
"""Figure with all optimizer steps that loss scaling skipped so far."""
MOST_SKIPPED = 3
"""From how many of those in the window on it is told: fewer are its way of finding the scale."""


def advice(rows: Sequence[Mapping[str, float]]) -> str:
    """What keeps the last `WINDOW` steps from learning, and what to try; "" if they learn.

    rows: figures of the steps so far (`report.rollout_figures` and the trainer's), oldest first.
    """
    last = rows[-WINDOW:]
    if len(last) < WINDOW:
        return ""
    if last[-1].get(SKIPPED, 0.0) - last[0].get(SKIPPED, 0.0) >= MOST_SKIPPED:
        return _overflowing(last)
    if _mean(last, "frac_reward_zero_std") < MOST:
        return ""
    if _mean(last, "reward") >= SOLVED:
        return ""
    if _mean(last, "frac_groups_all_wrong") >= MOST:
        return _never_right(last)
    return (
        f"collapsed: in {_percent(last, 'frac_reward_zero_std')} of the groups all samples earn "
        f"the same (entropy {_mean(last, 'entropy'):.3f} nats, reward "
        f"{_mean(last, 'reward'):.2f}), so there is next to no gradient. Start again with "
        "--algorithm dapo, --warmup-steps 10, more --samples, or a lower --lr"
    )


def _overflowing(last: Sequence[Mapping[str, float]]) -> str:
    return (
        f"{last[-1][SKIPPED] - last[0][SKIPPED]:.0f} of the last optimizer steps were skipped: "
        "gradients overflow in float16, and the loss scale is down to "
        f"{last[-1]['train/loss_scale']:g}. If it goes on falling, start again with --dtype "
        "bfloat16 or a lower --lr"
    )


def _never_right(last: Sequence[Mapping[str, float]]) -> str:
    told = (
        f"no sample is right in {_percent(last, 'frac_groups_all_wrong')} of the groups, so "
        "nothing says what to do more often. Show worked examples in the prompt, start with easier "
        "problems or a stronger model, give credit for parts, or take more --samples"
    )
    if _mean(last, "completions/clipped_ratio") > 0.5:
        told += "; most replies are cut off: raise --max-new-tokens"
    return told


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(row.get(key, 0.0) for row in rows) / len(rows)


def _percent(rows: Sequence[Mapping[str, float]], key: str) -> str:
    return f"{100 * _mean(rows, key):.0f}%"
