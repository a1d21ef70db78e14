"""Best of n: several answers to a question, of which a judge picks one.

python docs/examples/best_of_n.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse

from engine.config import EngineConfig
from rollout.launch import launch
from rollout.program import Generated, Runner, Selected, State


async def answer_once(branch: State) -> Generated:
    """One of the answers; every branch draws with seeds of its own."""
    return await branch.gen("answer", max_new_tokens=24, temperature=0.8)


async def judged(branch: State, answer: Generated) -> Selected:
    """Whether the judge takes an answer for right, by the logprobs of yes and no."""
    branch.user(f"Somebody answered: {answer}\nIs that right? Say yes or no.")
    return await branch.select("verdict", ["yes", "no"])


async def best_of_n(s: State, question: str, count: int = 4) -> tuple[str, float]:
    """The answer that the judge prefers, and by how much yes is likelier than no."""
    s.user(question)
    answers = await s.fork(count).run(answer_once)
    verdicts = await s.fork(count).run(judged, answers)
    margins = [verdict.logprobs[0] - verdict.logprobs[1] for verdict in verdicts]
    best = max(range(count), key=margins.__getitem__)
    return answers[best].text, margins[best]


def main() -> None:
    """Answer two questions at once."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    questions = ["What is the capital of France?", "How many legs has a spider?"]
    with launch(EngineConfig(model=arguments.parse_args().model)) as replica:
        runner = Runner.of_replica(replica, seed=1)
        found = runner.run_batch(best_of_n, [{"question": each} for each in questions])
    for question, (answer, margin) in zip(questions, found, strict=True):
        print(f"{question}\n  {answer!r} ({margin:+.2f})")


if __name__ == "__main__":
    main()
