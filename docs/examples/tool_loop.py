"""A loop of tools: the model calls functions, reads what they return, and answers.

python docs/examples/tool_loop.py --model .models/SmolLM2-135M-Instruct.Q4_1.gguf
python docs/examples/tool_loop.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse

from engine.config import EngineConfig
from rollout.launch import launch
from rollout.program import Answer, Runner, State, ToolRefused, answer, tool

STOCK = {"apple": 12, "pear": 0}


@tool
def stock(fruit: str) -> int:
    """How many pieces of a fruit are in stock."""
    if fruit not in STOCK:
        raise ToolRefused(f"there is no {fruit}; there are {', '.join(STOCK)}")
    return STOCK[fruit]


async def shop(s: State, question: str) -> Answer:
    """Answer a question about the stock. A model this small has to be told to look first."""
    s.use_tools([stock])
    s.user(question)
    return await answer(
        s, "reply", [stock], call_first="stock", max_new_tokens=48, temperature=0, max_rounds=4
    )


def main() -> None:
    """Ask one question, of a model in this process or of a server."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model")
    arguments.add_argument("--url")
    given = arguments.parse_args()
    question = "How many of the fruit 'apple' do you have?"
    if given.url:
        found = Runner.of_server(given.url).run(shop, question)
    else:
        with launch(EngineConfig(model=given.model)) as replica:
            found = Runner.of_replica(replica).run(shop, question)
    for call in found.calls:
        print(f"{call.name}({call.arguments}) -> {call.result}")
    print(found.text)


if __name__ == "__main__":
    main()
