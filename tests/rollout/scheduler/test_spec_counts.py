"""What the scheduler says of drafts: of each sequence, and of all."""

from __future__ import annotations

import pytest

from engine.config import SpeculativeConfig
from engine.protocol import ErrorInfo, SpecCounts
from tests.helpers.scheduling import Bench, make_request

NGRAM = SpeculativeConfig(method="ngram", draft_tokens=3)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_totals_are_the_sums_of_the_outputs(overlap: bool, stream: bool) -> None:
    bench = Bench(speculative=NGRAM, overlap=overlap)
    for number in range(4):
        fields = {"max_new": 20 + number, "stream": stream, "draft_tokens": number}
        bench.add(make_request(str(number), [number, 1, 2], **fields))
    spec = {rid: output.spec for rid, output in bench.run().items()}
    assert spec["0"] == SpecCounts()
    counts = [count for count in spec.values() if count is not None]
    assert len(counts) == 4
    stats = bench.scheduler.stats()
    assert stats.num_verified_rows == sum(count.verifies for count in counts) > 0
    assert stats.num_drafted_tokens == sum(count.drafted for count in counts)
    assert stats.num_accepted_tokens == sum(count.accepted for count in counts) > 0
    verifying = [plan for plan in bench.plans if plan.draft_lens.any()]
    assert 0 < stats.num_verify_steps <= len(verifying)
    assert bench.scheduler.stats().draft_len <= 3


def test_a_retracted_sequence_keeps_its_counts() -> None:
    bench = Bench(speculative=NGRAM)
    bench.add(make_request("a", [1, 2], max_new=30, stream=True))
    for _ in range(5):
        bench.step()
    before = bench.outputs["a"][-1].spec
    assert before is not None
    assert before.drafted > 0
    bench.scheduler.pause("retract")
    bench.scheduler.resume()
    after = bench.run()["a"].spec
    assert after is not None
    assert after.drafted > before.drafted
    assert after.drafted == bench.scheduler.stats().num_drafted_tokens


def test_a_scheduler_that_drafts_nothing_says_so() -> None:
    bench = Bench()
    bench.add(make_request("a", [1], max_new=4, stream=True), make_request("b", [2], max_new=4))
    assert [output.spec for output in bench.run().values()] == [None, None]
    stats = bench.scheduler.stats()
    assert (stats.num_verify_steps, stats.num_drafted_tokens, stats.draft_len) == (0, 0, 0)


def test_whoever_fails_or_never_ran_has_counts_too() -> None:
    bench = Bench(speculative=NGRAM)
    bench.add(make_request("a", [1], max_new=40))
    for _ in range(4):
        bench.step()
    drafted = bench.scheduler.stats().num_drafted_tokens
    (failed,) = bench.scheduler.fail_all(ErrorInfo(kind="OutOfMemory", message="full"))
    assert failed.spec is not None
    assert failed.spec.drafted == drafted > 0
    assert bench.scheduler.stats().num_drafted_tokens == drafted
    bench.add(make_request("b", [1]))
    (aborted,) = bench.scheduler.abort(all=True)
    assert aborted.spec == SpecCounts()
