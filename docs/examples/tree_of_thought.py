"""A tree of thoughts: partial solutions branch, a value is put on each, the best go on.

    python docs/examples/tree_of_thought.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf

The method is that of Yao et al. (2023, arXiv:2305.10601): here a breadth-first search.
"""

from __future__ import annotations

import argparse

from engine.config import EngineConfig
from rollout.launch import launch
from rollout.program import Runner, State

VALUES = ["sure", "likely", "impossible"]


async def think(branch: State, number: int) -> State:
    """One more thought."""
    branch.user(f"Write step {number} of the solution in one sentence.")
    await branch.gen(f"step {number}", max_new_tokens=24, stop=["\n"], temperature=0.8)
    return branch


async def value(branch: State) -> float:
    """How sure the model is that the solution so far leads to the answer: a logprob."""
    branch.user("Is this going to work? Say sure, likely or impossible.")
    found = await branch.select("value", VALUES)
    return found.logprobs[0] - found.logprobs[-1]


async def tree_of_thought(
    s: State, problem: str, depth: int = 2, width: int = 3, keep: int = 2
) -> list[str]:
    """The steps of the best solution. width: thoughts a solution; keep: solutions a level."""
    s.system("Solve the problem step by step.")
    s.user(problem)
    s.assistant("I will write the steps one by one.")
    frontier = [s]
    for number in range(1, depth + 1):
        grown = []
        for solution in frontier:
            grown += await solution.fork(width).run(think, [number] * width)
        # Forks of the solutions, so that the question of their value is no part of them.
        ranked = [(await solution.fork(1).run(value))[0] for solution in grown]
        order = sorted(range(len(grown)), key=lambda place: -ranked[place])
        frontier = [grown[place] for place in order[:keep]]
    s.join(frontier[0])
    return [str(s[f"step {number}"]) for number in range(1, depth + 1)]


def main() -> None:
    """Solve a problem."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    problem = "Tom has 3 boxes with 4 apples each and eats 2 apples. How many are left?"
    with launch(EngineConfig(model=arguments.parse_args().model)) as replica:
        for step in Runner.of_replica(replica).run(tree_of_thought, problem):
            print(step)


if __name__ == "__main__":
    main()
