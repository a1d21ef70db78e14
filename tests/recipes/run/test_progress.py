"""What a run keeps of its evaluations."""

from __future__ import annotations

from recipes.run.progress import RunProgress


def test_the_best_of_rewards_below_zero_is_one_of_them() -> None:
    progress = RunProgress()
    for step, reward in enumerate([-3.0, -1.5, -2.0]):
        progress.step = step
        progress.measured({"eval/accuracy": reward})
    assert (progress.best_accuracy, progress.best_step) == (-1.5, 1)
    assert RunProgress.from_dict(progress.as_dict()) == progress
