"""The engine of `offline` in a process of its own, for `benchmarks/serving.py`.

Standard input: one JSON object a line, {"prompts": [[ids], ...], "max_new": N, "stream": bool}; for
each, standard output gets one of what `rollout.offline.generate` took for all of them at once:
{"seconds", "tokens", "first_s"}. With `stream`, outputs are asked for after every step, and
`first_s` has the seconds to the first token of each.
"""

from __future__ import annotations

import json
import sys
import time

import checkout  # noqa: F401
import msgspec
import numpy as np

from engine.config import EngineConfig
from engine.protocol import Request, SamplingParams
from rollout.launch import launch
from rollout.offline import generate
from rollout.replica.base import Replica


def first_tokens(replica: Replica, requests: list[Request]) -> tuple[list[float], int]:
    """Seconds to each request's first token, and all tokens."""
    start, first, tokens = time.perf_counter(), {}, 0
    replica.submit([msgspec.structs.replace(request, stream=True) for request in requests])
    while not replica.idle():
        for output in replica.step():
            tokens += len(output.token_ids)
            first.setdefault(output.rid, time.perf_counter() - start)
    return list(first.values()), tokens


def main() -> None:
    """Load the model that the first argument describes, then answer lines."""
    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)
    with launch(config) as replica:
        print(json.dumps({"ready": True}), flush=True)
        for number, line in enumerate(sys.stdin):
            job = json.loads(line)
            sampling = SamplingParams(max_new_tokens=job["max_new"])
            requests = [
                Request(
                    rid=f"{number}-{index}",
                    prompt_ids=np.array(ids, np.int32),
                    sampling=sampling,
                    seed=index,
                )
                for index, ids in enumerate(job["prompts"])
            ]
            start, first = time.perf_counter(), []
            if job["stream"]:
                first, tokens = first_tokens(replica, requests)
            else:
                tokens = sum(len(output.token_ids) for output in generate(replica, requests))
            found = {"seconds": time.perf_counter() - start, "tokens": tokens, "first_s": first}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
