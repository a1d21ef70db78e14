"""Rewards by what `--reward` says."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from recipes.environments.base import Environment
from recipes.rewards.base import Reward
from recipes.rewards.graders.pool import MOST_PROCESSES
from recipes.rewards.grading import Grading
from recipes.rewards.programs.code import code_reward
from recipes.rewards.programs.code_options import CodeOptions
from recipes.rewards.programs.tested import column_tests
from recipes.rewards.reward_options import (
    GraderOptions,
    check_reward_options,
    is_model_reward,
)
from recipes.rewards.reward_sum import RewardSum
from recipes.rewards.services.http_reward import HttpReward
from recipes.rewards.services.judge import Judge, read_template
from recipes.rewards.services.label_judge import PROMPT as LABEL_PROMPT
from recipes.rewards.services.label_judge import LabelJudge
from recipes.rewards.task_reward import task_reward
from recipes.rewards.user_function import UserFunction
from recipes.types import Problem


def open_grading(
    options: GraderOptions,
    environment: Environment,
    problems: Sequence[Problem],
    *,
    processes_here: int = 1,
    code: CodeOptions | None = None,
    open_model: Callable[[str], Reward] | None = None,
) -> Grading:
    """The grading of a run or an evaluation; its processes are started, and have loaded what a
    user wrote.

    problems: some of the task's, whose columns tell which names there are. processes_here: of the
    run on this host, which share the cores. code: how programs are run, where replies are some.
    open_model: opens the reward models that are named (`reward_models/open_reward_model.py`).
    Raises InvalidRequest naming the option.
    """
    check_reward_options(options)
    share = max(1, min((os.cpu_count() or 1) // processes_here, MOST_PROCESSES))
    parts: list[Reward] = []
    try:
        for name in options.reward or ("task",):
            if name in ("task", "code"):
                parts.append(_open_own(name, environment, problems, share, code or CodeOptions()))
            elif open_model is not None and is_model_reward(name):
                parts.append(open_model(name))
            else:
                parts.append(_open(name, options, problems, share))
    except BaseException:
        Grading(RewardSum(parts)).close()
        raise
    whole = parts[0] if len(parts) == 1 else RewardSum(parts)
    return Grading(whole, measures_accuracy=options.measures_accuracy)


def _open_own(
    name: str,
    environment: Environment,
    problems: Sequence[Problem],
    num_processes: int,
    code: CodeOptions,
) -> Reward:
    if name == "task":
        return task_reward(environment, num_processes=num_processes, code=code)
    for problem in problems:
        column_tests("", problem)
    return code_reward(code, num_processes=num_processes)


def _judge(url: str, options: GraderOptions, problems: Sequence[Problem]) -> Reward:
    path, model, timeout_s = options.judge_prompt, options.judge_model, options.reward_timeout
    if labels := options.judge_labels:
        template = read_template(path, problems, own=LABEL_PROMPT, more=("labels",))
        return LabelJudge(url, model=model, template=template, labels=labels, timeout_s=timeout_s)
    return Judge(
        url,
        model=model,
        template=read_template(path, problems),
        votes=options.judge_votes,
        timeout_s=timeout_s,
        schema=options.judge_schema,
    )


def _open(
    name: str, options: GraderOptions, problems: Sequence[Problem], num_processes: int
) -> Reward:
    timeout_s = options.reward_timeout
    if name.startswith(("http://", "https://")):
        return HttpReward(name, timeout_s=timeout_s)
    if name.startswith("judge:"):
        return _judge(name.removeprefix("judge:"), options, problems)
    return UserFunction(name, problems, timeout_s=timeout_s, num_processes=num_processes)
