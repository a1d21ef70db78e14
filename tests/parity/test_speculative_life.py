"""What may happen to a row within a run of accepted drafts: stops, caps, pages that end, aborts,
retractions, pauses and updates. What comes out is what plain decoding gives, and every page
returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.protocol import Abort, FlushCache, Pause, Request, RequestOutput, Resume, Stop
from rollout.replica.inline import InlineReplica
from rollout.requests.generate import generate
from tests.helpers.drafters import DraftingEngine, random_prompts, texts_of
from tests.helpers.engines import drain, exact_logprobs, make_replica, request
from tests.helpers.same_outputs import SameOutputs, logprob_noise
from tests.helpers.tiny_models import tiny_hf, write_tiny
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from trainer_bridge import push

pytestmark = pytest.mark.slow

VOCAB, SIZE = 100, 24
DRAFTERS: dict[str, dict[str, Any]] = {"perfect": {}, "mixed": {"mixed": True}}


class Bed:
    """A tiny model, and engines with and without drafts over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_tiny(folder, "qwen2")

    def plain(self, requests: list[Request], **options: Any) -> dict[str, RequestOutput]:
        with make_replica(self.folder, **options) as replica:
            replica.submit(requests)
            return drain(replica)

    def same(self, requests: list[Request], got: dict, want: dict) -> None:
        SameOutputs(self.model).same(requests, got, want)


@pytest.fixture(scope="module")
def bed(tmp_path_factory) -> Bed:
    return Bed(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[True, False], ids=["overlap", "in turn"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=DRAFTERS)
def drafter(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DRAFTERS[request.param]


def several(count: int, size: int = SIZE, **fields: Any) -> list[Request]:
    prompts = random_prompts(count, VOCAB, longest=30, seed=4)
    return [
        msgspec.structs.replace(
            request(f"r{nth}", prompt, seed=50 + nth, max_new_tokens=size), **fields
        )
        for nth, prompt in enumerate(prompts)
    ]


def check_pages(replica: InlineReplica) -> None:
    """Whatever no one holds is free or cached, and once the cache is empty all of it is free."""
    state = replica.state()
    assert (state.num_running, state.num_waiting) == (0, 0)
    assert state.free_pages + state.cached_pages == state.total_pages
    replica.send(FlushCache())
    assert replica.state().free_pages == state.total_pages


def run_drafted(
    bed: Bed,
    requests: list[Request],
    known: dict[int, list[int]],
    drafter: dict[str, Any],
    **options: Any,
) -> dict[str, RequestOutput]:
    """All of them through an engine that drafts from known texts."""
    with DraftingEngine(bed.folder, **options) as engine:
        engine.draft_texts(known, **drafter)
        engine.replica.submit(requests)
        got = drain(engine.replica)
        check_pages(engine.replica)
    accepted = sum(output.spec.accepted for output in got.values() if output.spec is not None)
    assert accepted > 0, "nothing was drafted"
    return got


def test_a_stream_brings_runs(bed: Bed, overlap: bool, drafter: dict[str, Any]) -> None:
    requests = several(8, stream=True)
    want = bed.plain(several(8))
    known = texts_of(requests, want)
    parts: dict[str, list[RequestOutput]] = {one.rid: [] for one in requests}
    with DraftingEngine(bed.folder, overlap=overlap) as engine:
        engine.draft_texts(known, **drafter)
        engine.replica.submit(requests)
        while not engine.replica.idle():
            for output in engine.replica.step():
                parts[output.rid].append(output)
    sizes = set()
    for rid, outputs in parts.items():
        end = 0
        for output in outputs:
            assert output.start == end
            end += len(output.token_ids)
            sizes.add(len(output.token_ids))
            spans = [(span.start, span.end) for span in output.spans]
            assert spans == ([(output.start, end)] if len(output.token_ids) else [])
        tokens = np.concatenate([output.token_ids for output in outputs])
        assert tokens.tolist() == want[rid].token_ids.tolist()
        logprobs = np.concatenate([output.logprobs for output in outputs])
        atol = logprob_noise(min(one.sampling.temperature or 1.0 for one in requests))
        np.testing.assert_allclose(logprobs, want[rid].logprobs, atol=atol)
        assert outputs[-1].finish == want[rid].finish
    # A chunk a run: three drafts at most, and the token behind them.
    assert 1 < max(sizes) <= 4


@pytest.mark.parametrize("k", [3, 7])
def test_a_stop_token_at_each_offset(bed: Bed, k: int, overlap: bool) -> None:
    """The two tokens behind it would stop the row too. Also with a minimum that passes over it, and
    a cap one before, at and behind it."""
    (base,) = several(1)
    text = bed.plain([base])["r0"].token_ids.tolist()
    requests = []
    for at in range(SIZE):
        for cap in (SIZE, at, at + 1, at + 2):
            for least in (0, at + 1, at + 2):
                if 0 < cap <= SIZE and least <= cap:
                    requests.append(stopped(base, text[at : at + 3], len(requests), cap, least))
    want = bed.plain(requests)
    # A drafter does not know of stops: it goes on behind them.
    known = {one.seed: [*base.prompt_ids.tolist(), *text] for one in requests}
    got = run_drafted(bed, requests, known, {}, k=k, overlap=overlap)
    bed.same(requests, got, want)
    ends = {output.finish.type for output in got.values() if output.finish is not None}
    assert ends == {"stop", "length"}


def stopped(base: Request, stop_ids: list[int], nth: int, cap: int, least: int) -> Request:
    sampling = msgspec.structs.replace(
        base.sampling, max_new_tokens=cap, min_new_tokens=least, stop_token_ids=stop_ids
    )
    return msgspec.structs.replace(base, rid=f"s{nth}", sampling=sampling, stop_ids=stop_ids)


def test_a_stop_string_within_a_run(bed: Bed, overlap: bool, drafter: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    requests = several(12)
    want = bed.plain(requests)
    known = texts_of(requests, want)
    cut = []
    for nth, one in enumerate(requests):
        ids = [token for token in want[one.rid].token_ids[3 + nth :].tolist() if token < 94]
        stop = "".join(chr(33 + token) for token in ids[:1])
        cut.append(
            msgspec.structs.replace(
                one, sampling=msgspec.structs.replace(one.sampling, stop=[stop])
            )
        )
    with make_replica(bed.folder, overlap=overlap) as replica:
        plain = generate(replica, cut, tokenizer=tokenizer)
    with DraftingEngine(bed.folder, k=7, overlap=overlap) as engine:
        engine.draft_texts(known, **drafter)
        found = generate(engine.replica, cut, tokenizer=tokenizer)
        check_pages(engine.replica)
    for got, expected in zip(found, plain, strict=True):
        assert got.token_ids.tolist() == expected.token_ids.tolist()
        assert got.finish == expected.finish and got.finish.type == "stop"


def test_ended_from_outside_within_what_came(bed: Bed, overlap: bool) -> None:
    """A stop at fewer tokens than there are takes the rest back."""
    requests = several(6, stream=True)
    want = bed.plain(several(6))
    tokens: dict[str, list[int]] = {one.rid: [] for one in requests}
    finishes, sent = {}, set()
    with DraftingEngine(bed.folder, k=7, overlap=overlap) as engine:
        engine.draft_texts(texts_of(requests, want))
        engine.replica.submit(requests)
        while not engine.replica.idle():
            for output in engine.replica.step():
                tokens[output.rid] += output.token_ids.tolist()
                if output.finish is not None:
                    finishes[output.rid] = output.finish
            for rid, ids in tokens.items():
                if len(ids) > 6 and rid not in sent and rid not in finishes:
                    sent.add(rid)
                    engine.replica.send(Stop(rid=rid, num_tokens=5, matched="x"))
        check_pages(engine.replica)
    assert sent == set(tokens)
    for rid, finish in finishes.items():
        assert (finish.type, finish.matched) == ("stop", "x")
        assert tokens[rid] == want[rid].token_ids[: len(tokens[rid])].tolist()


@pytest.mark.parametrize("k", [1, 3, 7])
def test_every_end_of_a_page(bed: Bed, k: int, drafter: dict[str, Any]) -> None:
    requests = [
        request(
            f"{given}-{asked}",
            range(10, 10 + given),
            seed=100 * given + asked,
            max_new_tokens=asked,
        )
        for given in range(1, 9)
        for asked in (1, 2, 3, 4, 5, 8, 9)
    ]
    want = bed.plain(requests)
    known = texts_of(requests, want)
    got = run_drafted(bed, requests, known, drafter, k=k, page_size=4)
    bed.same(requests, got, want)


@pytest.mark.parametrize("k", [3, 7])
def test_the_end_of_the_context(bed: Bed, k: int, drafter: dict[str, Any]) -> None:
    context = 32
    requests = [
        request(f"c{given}", range(10, 10 + given), seed=given, max_new_tokens=context - given)
        for given in range(1, context)
    ]
    want = bed.plain(requests, context_length=context)
    known = texts_of(requests, want)
    got = run_drafted(bed, requests, known, drafter, k=k, context_length=context)
    bed.same(requests, got, want)
    assert all(len(got[one.rid].token_ids) == context - len(one.prompt_ids) for one in requests)


@pytest.mark.parametrize("own", [False, True], ids=["known texts", "n-gram"])
def test_samples_of_one_prompt(bed: Bed, own: bool, overlap: bool) -> None:
    prompt = [7, 8, 9, 7, 8, 9, 7, 8, 9, 7]
    requests = [
        request(f"g{nth}", prompt, seed=nth, group="g", temperature=0.3, max_new_tokens=40)
        for nth in range(10)
    ]
    want = bed.plain(requests)
    with DraftingEngine(bed.folder, overlap=overlap) as engine:
        if not own:
            engine.draft_texts(texts_of(requests, want), mixed=True)
        engine.replica.submit(requests)
        got = drain(engine.replica)
        check_pages(engine.replica)
    bed.same(requests, got, want)
    assert sum(output.spec.drafted for output in got.values() if output.spec is not None) > 0


@pytest.mark.parametrize("after", range(1, 8))
def test_aborted_while_drafts_are_verified(bed: Bed, after: int, overlap: bool) -> None:
    requests = several(8)
    want = bed.plain(requests)
    with DraftingEngine(bed.folder, overlap=overlap) as engine:
        engine.draft_texts(texts_of(requests, want), mixed=True)
        engine.replica.submit(requests)
        finals: dict[str, RequestOutput] = {}
        for _ in range(after):
            finals |= {one.rid: one for one in engine.replica.step() if one.finish is not None}
        engine.replica.send(Abort(rids=["r1", "r4", "r5"]))
        # Whoever takes their slots is not what was drafted for.
        late = [msgspec.structs.replace(one, rid=f"late-{one.rid}") for one in requests[:3]]
        engine.replica.submit(late)
        finals |= drain(engine.replica)
        check_pages(engine.replica)
    assert finals.keys() == {one.rid for one in [*requests, *late]}
    for rid, got in finals.items():
        expected = want[rid.removeprefix("late-")]
        if got.finish != expected.finish:
            assert got.finish is not None and got.finish.type == "abort"
            assert rid in ("r1", "r4", "r5")
        assert got.token_ids.tolist() == expected.token_ids[: len(got.token_ids)].tolist()


@pytest.mark.parametrize("num_pages", [24, 32, 44])
def test_retracted_in_a_small_pool(bed: Bed, num_pages: int, overlap: bool, drafter) -> None:
    requests = several(12, size=40)
    want = bed.plain(requests)
    with DraftingEngine(bed.folder, num_pages=num_pages, page_size=4, overlap=overlap) as engine:
        engine.draft_texts(texts_of(requests, want), **drafter)
        engine.replica.submit(requests)
        got = drain(engine.replica)
        retractions = engine.replica.state().num_retractions
        check_pages(engine.replica)
    bed.same(requests, got, want)
    assert retractions > 0


@pytest.mark.parametrize("mode", ["keep", "retract"])
@pytest.mark.parametrize("after", [2, 3, 4, 5])
def test_paused_and_resumed(bed: Bed, mode: Any, after: int, overlap: bool) -> None:
    requests = several(8)
    want = bed.plain(requests)
    with DraftingEngine(bed.folder, overlap=overlap) as engine:
        engine.draft_texts(texts_of(requests, want), mixed=True)
        engine.replica.submit(requests)
        finals: dict[str, RequestOutput] = {}
        for _ in range(after):
            finals |= {one.rid: one for one in engine.replica.step() if one.finish is not None}
        engine.replica.send(Pause(mode=mode))
        # What is known then is known for good.
        known = engine.replica.state().num_output_tokens
        assert engine.replica.step() == []
        assert engine.replica.state().num_output_tokens == known
        engine.replica.send(Resume())
        finals |= drain(engine.replica)
        check_pages(engine.replica)
    bed.same(requests, finals, want)


@pytest.mark.parametrize("policy", ["keep", "recompute", "fresh"])
@pytest.mark.parametrize("after", [3, 4, 5])
def test_an_update_between_steps(bed: Bed, policy: Any, after: int, overlap: bool) -> None:
    """Behind the commit nothing is sampled by the old weights, whatever was drafted before it."""
    new = tiny_hf("qwen2", seed=1)
    requests = several(6, kv_policy=policy)
    want = bed.plain(several(6))
    with DraftingEngine(bed.folder, overlap=overlap) as engine:
        engine.draft_texts(texts_of(requests, want))
        engine.replica.submit(requests)
        for _ in range(after):
            assert all(output.finish is None for output in engine.replica.step())
        known = engine.replica.state().num_output_tokens
        push(new, 1, engine.replica)
        got = drain(engine.replica)
        check_pages(engine.replica)
    old_tokens = 0
    for one in requests:
        output = got[one.rid]
        assert len(output.token_ids) == SIZE
        for span, start, end in spans_of(output):
            model = new if span else bed.model
            old_tokens += 0 if span else end - start
            if span and policy == "keep":
                continue
            logprobs = exact_logprobs(model, one.prompt_ids.tolist(), output.token_ids.tolist())
            np.testing.assert_allclose(
                output.logprobs[start:end], logprobs[start:end], atol=1e-4, err_msg=one.rid
            )
        first = [end for version, _, end in spans_of(output) if version == 0]
        assert (
            output.token_ids[: sum(first)].tolist()
            == want[one.rid].token_ids[: sum(first)].tolist()
        )
    # With overlap one step more was under way, of as many tokens as its drafts gave.
    in_flight = 4 * len(requests) if overlap else 0
    assert old_tokens == (0 if policy == "fresh" else known + in_flight)


def spans_of(output: RequestOutput) -> Iterator[tuple[int, int, int]]:
    """Version, start and end of each, one after the other from 0 to the end."""
    end = 0
    for span in output.spans:
        assert span.start == end < span.end
        end = span.end
        yield span.version, span.start, span.end
    assert end == len(output.token_ids)
