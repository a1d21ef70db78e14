"""A request cut anywhere and continued by another engine gives what one engine gives that was left
alone: float32, every sampler. A first difference is excused where rounding may decide the draw
(`near_edges`), and counted."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol import Request, RequestOutput
from rollout.replica.inline import InlineReplica
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.near_edges import on_an_edge
from tests.helpers.samplers import SAMPLERS
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

SIZE = 24
PROMPT = list(range(5, 30))


class Pair:
    """Two engines of one checkpoint that schedule unlike each other, and its model."""

    def __init__(self, folder, arch: str) -> None:
        self.model = write_tiny(folder, arch)
        self.first = make_replica(folder)
        self.second = make_replica(folder, page_size=4, max_chunk_tokens=7, max_step_tokens=80)
        self.num_tokens = self.num_excused = 0

    def close(self) -> None:
        self.first.close()
        self.second.close()

    def check(self, asked: Request, uncut: RequestOutput, part: RequestOutput) -> None:
        """`part` is the rest of `uncut`, as far as float32 can say."""
        want, got = uncut.token_ids[part.start :], part.token_ids
        size = min(len(want), len(got))
        other = np.flatnonzero(want[:size] != got[:size])
        self.num_tokens += len(want)
        if len(other):
            first = part.start + int(other[0])
            told = f"{asked.rid} goes on from {part.start} and differs at {first}"
            assert on_an_edge(self.model, asked, uncut.token_ids[:first].tolist()), told
            self.num_excused += 1
            return
        assert (got.tolist(), part.finish) == (want.tolist(), uncut.finish), asked.rid
        logprobs = uncut.logprobs[part.start :]
        np.testing.assert_allclose(part.logprobs, logprobs, atol=1e-5, err_msg=asked.rid)
        spans = [(span.start, span.end) for span in part.spans]
        assert spans == ([(part.start, len(uncut.token_ids))] if len(got) else [])

    def check_excuses(self) -> None:
        """At most one in 10,000 tokens."""
        assert self.num_excused <= -(-self.num_tokens // 10_000)


def ask(sampler: str, seed: int, **fields: object) -> Request:
    sampling = {"max_new_tokens": SIZE, **SAMPLERS[sampler]}
    stop_ids = sampling.get("stop_token_ids", [])
    asked = request(f"{sampler}-{seed}", PROMPT, seed=seed, stop_ids=stop_ids, **sampling)
    return msgspec.structs.replace(asked, **fields)


def run(replica: InlineReplica, requests: list[Request]) -> dict[str, RequestOutput]:
    replica.submit(requests)
    return drain(replica)


def going_on(asked: Request, uncut: RequestOutput, cut: int) -> Request:
    rid = f"{asked.rid}:{cut}"
    return msgspec.structs.replace(asked, rid=rid, output_ids=uncut.token_ids[:cut])


def check_cuts(pair: Pair, samplers: list[str], seeds: list[int], cuts: list[int]) -> None:
    asked = [ask(sampler, seed) for sampler in samplers for seed in seeds]
    uncut = run(pair.first, asked)
    parts = [
        (one, going_on(one, uncut[one.rid], cut))
        for one in asked
        for cut in cuts
        if cut <= len(uncut[one.rid].token_ids)
    ]
    found = run(pair.second, [part for _, part in parts])
    for one, part in parts:
        pair.check(one, uncut[one.rid], found[part.rid])
    pair.check_excuses()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = Pair(tmp_path_factory.mktemp("tiny"), "llama")
    yield made
    made.close()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_at_some_cuts(pair: Pair, sampler: str) -> None:
    check_cuts(pair, [sampler], [1, 2], [1, 2, 11, SIZE - 1, SIZE])


@pytest.mark.long
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_sampler_at_every_cut(tmp_path, arch: str) -> None:
    pair = Pair(tmp_path, arch)
    for sampler in SAMPLERS:
        check_cuts(pair, [sampler], list(range(6)), list(range(1, SIZE + 1)))
    assert pair.num_tokens > 10_000
    pair.close()


def test_sent_as_a_prompt_they_would_be_others(pair: Pair) -> None:
    """What `output_ids` is for: a prompt's tokens are neither counted nor penalised as output."""
    asked = [ask(sampler, seed) for sampler in ("frequency", "minimum") for seed in range(3)]
    uncut = run(pair.first, asked)
    found = run(pair.second, [resent(one, uncut[one.rid].token_ids[:6]) for one in asked])
    other = {
        one.rid.partition("-")[0]
        for one in asked
        if found[one.rid].token_ids.tolist() != uncut[one.rid].token_ids[6:].tolist()
    }
    assert other == {"frequency", "minimum"}


def resent(asked: Request, output_ids: np.ndarray) -> Request:
    """The request with its output tokens as a part of the prompt."""
    left = asked.sampling.max_new_tokens - len(output_ids)
    return msgspec.structs.replace(
        asked,
        prompt_ids=np.concatenate((asked.prompt_ids, output_ids)),
        sampling=msgspec.structs.replace(asked.sampling, max_new_tokens=left),
    )


@pytest.mark.parametrize("sampler", ["greedy_penalised", "all"])
def test_held_at_every_index(pair: Pair, sampler: str) -> None:
    asked = ask(sampler, 5)
    uncut = run(pair.first, [asked])[asked.rid]
    size = len(uncut.token_ids)
    held = [msgspec.structs.replace(asked, rid=str(at), hold_at=at) for at in range(1, SIZE + 1)]
    found = run(pair.second, held)
    for at in range(1, SIZE + 1):
        output = found[str(at)]
        assert output.token_ids.tolist() == uncut.token_ids[:at].tolist()
        assert output.finish == uncut.finish if at >= size else output.finish.type == "hold"


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    seed=st.integers(0, 2**63 - 1),
    stops=st.lists(st.integers(1, SIZE), max_size=4, unique=True).map(sorted),
    prompt_size=st.integers(1, 40),
)
def test_cut_several_times(
    pair: Pair, sampler: str, seed: int, stops: list[int], prompt_size: int
) -> None:
    ids = np.arange(5, 5 + prompt_size, dtype=np.int32)
    asked = ask(sampler, seed, prompt_ids=ids, rid="cut")
    uncut = run(pair.first, [asked])["cut"]
    known = np.empty(0, np.int32)
    for turn, hold_at in enumerate([*stops, -1]):
        replica = pair.second if turn % 2 else pair.first
        part = msgspec.structs.replace(asked, output_ids=known, hold_at=hold_at)
        output = run(replica, [part])["cut"]
        end = len(uncut.token_ids) if hold_at < 0 else min(hold_at, len(uncut.token_ids))
        whole = np.concatenate((known, output.token_ids))
        other = np.flatnonzero(whole[:end] != uncut.token_ids[: len(whole)][:end])
        if len(other):
            assert on_an_edge(pair.model, asked, whole[: other[0]].tolist())
            pair.num_excused += 1
            return
        assert (output.start, len(whole)) == (len(known), end)
        known = whole
        if output.finish.type != "hold":
            break
    assert output.finish == uncut.finish
    pair.num_tokens += len(known)
    pair.check_excuses()
