"""The engine without a server, in a process of its own, for `benchmarks/over_http.py`.

The first argument is an `EngineConfig` as JSON. One job a line on standard input, a JSON object;
one line on standard output for each:

{"prompts": [[ids], ...], "samples": N, "max_new": M}: all at once; gives seconds and tokens, ids
    and logprobs having been gathered for each sequence.
{"prompts": [[ids], ...], "first": true, "max_new": M}: one after another; gives the seconds to the
    first token of each.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import checkout  # noqa: F401
import msgspec
import numpy as np

from engine.config import EngineConfig
from engine.protocol import Request, SamplingParams
from rollout.launch import launch
from rollout.replica.base import Replica


def requests_of(job: dict[str, Any], number: int) -> list[Request]:
    """The sequences of a job; samples of a prompt are a group."""
    sampling = SamplingParams(max_new_tokens=job["max_new"], ignore_eos=True)
    return [
        Request(
            rid=f"{number}-{prompt}-{sample}",
            group=f"{number}-{prompt}",
            prompt_ids=np.array(ids, np.int32),
            sampling=sampling,
            seed=prompt * 1000 + sample,
            stream=bool(job.get("first")),
        )
        for prompt, ids in enumerate(job["prompts"])
        for sample in range(job.get("samples", 1))
    ]


def group(replica: Replica, requests: list[Request]) -> dict[str, Any]:
    """All at once."""
    start, tokens = time.perf_counter(), 0
    replica.submit(requests)
    while not replica.idle():
        for output in replica.step():
            assert len(output.logprobs) == len(output.token_ids)
            tokens += len(output.token_ids)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def first(replica: Replica, requests: list[Request]) -> dict[str, Any]:
    """One after another."""
    found = []
    for request in requests:
        start = time.perf_counter()
        replica.submit([request])
        while not replica.step():
            pass
        found.append(time.perf_counter() - start)
        while not replica.idle():
            replica.step()
    return {"first_s": found}


def main() -> None:
    """Load the model, then answer lines."""
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    with launch(config) as replica:
        print(json.dumps({"ready": True}), flush=True)
        for number, line in enumerate(sys.stdin):
            job = json.loads(line)
            requests = requests_of(job, number)
            found = first(replica, requests) if job.get("first") else group(replica, requests)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
