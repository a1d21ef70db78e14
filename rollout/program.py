"""Prompt programs: what their authors import. docs/programs.md has a walk through one.

A program is an async function of a `State`. It adds text or turns, has the model go on (`gen`,
`select`, `answer` with tools), forks, and returns what it likes. A `Runner` runs it on a replica of
this process or on a server, alone or for many arguments at once:

    async def capital(s: State, country: str) -> str:
        s.user(f"What is the capital of {country}? Answer with its name.")
        return (await s.gen("name", max_new_tokens=16, temperature=0)).text

    with launch(EngineConfig(model="path/to/model")) as replica:
        names = Runner.of_replica(replica).run_batch(
            capital, [{"country": "France"}, {"country": "Peru"}]
        )

The words are those of SGLang's front-end language (Zheng et al., 2023, arXiv:2312.07104). Here a
program is plain Python that awaits its replies, a state grows by token ids, and every draw has a
seed.
"""

from __future__ import annotations

from rollout.programs.backends.replica_backend import ReplicaBackend
from rollout.programs.backends.server_backend import ServerBackend
from rollout.programs.errors import BranchFailed, ToolFailed, ToolRefused
from rollout.programs.forks import Forks
from rollout.programs.generated import Generated, Selected
from rollout.programs.runner import Program, Runner
from rollout.programs.state import State
from rollout.programs.tool_loop import Answer, answer
from rollout.programs.tools import Tool, tool

__all__ = [
    "Answer",
    "BranchFailed",
    "Forks",
    "Generated",
    "Program",
    "ReplicaBackend",
    "Runner",
    "Selected",
    "ServerBackend",
    "State",
    "Tool",
    "ToolFailed",
    "ToolRefused",
    "answer",
    "tool",
]
