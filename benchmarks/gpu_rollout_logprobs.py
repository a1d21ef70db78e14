"""What it costs to return the logprob of every sampled token.

The sampling kernel computes it from the sums that drawing the token needs anyway, and it leaves
the device in the same copy as the token ids: no setting turns that off. What a client can leave
out is the reply's list of logprobs (`return_logprob` of the native API), so that is what is
compared here: the same workload, each finished sequence turned into its reply and encoded as JSON,
with and without the list. Replies are built between steps here; a server builds them beside them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import msgspec
from gpu_rollout_engine import Bench
from gpu_rollout_workloads import Workload

from engine.protocol import GenerateRequest, Request, RequestOutput
from rollout.requests.respond import respond, to_wire


def logprob_cost(
    bench: Bench, work: Workload, *, shorten: int = 1, repeats: int = 2
) -> dict[str, Any]:
    """Tokens per second with and without returned logprobs, alternating, and their ratio."""
    bench.warm_up(work)
    rates: dict[bool, list[float]] = {True: [], False: []}
    reply_s: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for wanted in (True, False):
            rate, spent = _serve(bench, work, shorten, wanted)
            rates[wanted].append(rate)
            reply_s[wanted].append(spent)
    return {
        "with": rates[True],
        "without": rates[False],
        "reply_s_with": statistics.mean(reply_s[True]),
        "reply_s_without": statistics.mean(reply_s[False]),
        "ratio": statistics.mean(rates[True]) / statistics.mean(rates[False]),
    }


def _serve(bench: Bench, work: Workload, shorten: int, wanted: bool) -> tuple[float, float]:
    """Run once; (tokens per second, seconds spent on replies)."""
    requests = bench.requests(work, shorten)
    by_rid = {request.rid: request for request in requests}
    spent = 0.0
    started = time.perf_counter()
    num_tokens = bench.submit(requests)
    while not bench.replica.idle():
        outputs = bench.replica.step()
        before = time.perf_counter()
        for output in outputs:
            encoded = encode_reply(by_rid[output.rid], output, wanted)
            assert encoded
        spent += time.perf_counter() - before
    return num_tokens / (time.perf_counter() - started), spent


def encode_reply(request: Request, output: RequestOutput, return_logprob: bool) -> bytes:
    """The native reply to one finished sequence, as JSON."""
    wire = GenerateRequest(
        input_ids=[0], sampling_params=request.sampling, return_logprob=return_logprob
    )
    return msgspec.json.encode(to_wire(respond(wire, request, output, None)))
