"""Why a run learns nothing, told while it happens: a pure function of its last steps.

Called by `Run.finish_step`; what comes back is shown to the user once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recipes.algorithms.presets import Algorithm

WINDOW = 5
"""Steps that are looked at."""
MOST = 0.9
"""Share of groups, or of steps, without spread from which there is next to nothing to learn."""
SOLVED = 0.9
"""Mean reward from which groups agree because they are right."""
SKIPPED = "train/skipped_steps"
"""Figure with all optimizer steps that loss scaling skipped so far."""
MOST_SKIPPED = 3
"""From how many of those in the window on it is told: fewer are its way of finding the scale."""


def advice(rows: Sequence[Mapping[str, float]], algorithm: Algorithm) -> str:
    """What keeps the last `WINDOW` steps from learning, and what to try; "" if they learn.

    rows: figures of the steps so far (`report.rollout_figures` and the trainer's), oldest first.
    algorithm: of the run. What it does not learn from is no reason: rewards, where it distils.
    """
    last = rows[-WINDOW:]
    if len(last) < WINDOW:
        return ""
    if last[-1].get(SKIPPED, 0.0) - last[0].get(SKIPPED, 0.0) >= MOST_SKIPPED:
        return _overflowing(last)
    if algorithm.distils or _mean(last, "frac_reward_zero_std") < MOST:
        return ""
    if _mean(last, "reward") >= SOLVED:
        return ""
    if _mean(last, "frac_groups_all_wrong") >= MOST:
        return _never_right(last, algorithm)
    return (
        f"collapsed: in {_percent(last, 'frac_reward_zero_std')} of the "
        f"{'groups' if algorithm.compares_problem else 'steps'} all samples earn the same (entropy "
        f"{_mean(last, 'entropy'):.3f} nats, reward {_mean(last, 'reward'):.2f}), so nothing says "
        f"which to prefer. Start again with {_to_try(algorithm)}, or a lower --lr"
    )


def _to_try(algorithm: Algorithm) -> str:
    """Flags of the run's recipe that bring more spread, but for those that it has already."""
    flags = ["--warmup-steps 10", f"more {_more(algorithm)}"]
    if algorithm.compares_group and not algorithm.dynamic_sampling:
        flags.insert(0, "--algorithm dapo")
    return ", ".join(flags)


def _more(algorithm: Algorithm) -> str:
    """The flag of how many replies are compared with each other."""
    return "--samples" if algorithm.compares_problem else "--prompts-per-step"


def _overflowing(last: Sequence[Mapping[str, float]]) -> str:
    return (
        f"{last[-1][SKIPPED] - last[0][SKIPPED]:.0f} of the last optimizer steps were skipped: "
        "gradients overflow in float16, and the loss scale is down to "
        f"{last[-1]['train/loss_scale']:g}. If it goes on falling, start again with --dtype "
        "bfloat16 or a lower --lr"
    )


def _never_right(last: Sequence[Mapping[str, float]], algorithm: Algorithm) -> str:
    told = (
        f"no sample is right in {_percent(last, 'frac_groups_all_wrong')} of the groups, so "
        "nothing says what to do more often. Show worked examples in the prompt, start with easier "
        f"problems or a stronger model, give credit for parts, or take more {_more(algorithm)}"
    )
    if _mean(last, "completions/clipped_ratio") > 0.5:
        told += "; most replies are cut off: raise --max-new-tokens"
    return told


def _mean(rows: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(row.get(key, 0.0) for row in rows) / len(rows)


def _percent(rows: Sequence[Mapping[str, float]], key: str) -> str:
    return f"{100 * _mean(rows, key):.0f}%"
