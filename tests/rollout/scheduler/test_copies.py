"""Which copy of a model takes a request, and what the schedulers of all tell as one."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InvalidRequest, QueueFull
from engine.protocol import ErrorInfo
from rollout.scheduler.copies.frame import first_rows, rows_of_copies
from tests.helpers.copied_bench import NUM_COPIES, CopiedBench
from tests.helpers.scheduling import check_output, make_request


def copies_of(bench: CopiedBench, *rids: str) -> list[int]:
    return [bench.scheduler._placement.copy_of(rid) for rid in rids]


def test_requests_that_come_at_once_are_spread_by_the_kv_they_may_hold() -> None:
    bench = CopiedBench()
    bench.add(make_request("long", range(40), max_new=40))
    bench.add(*(make_request(f"r{i}", [i], max_new=9) for i in range(6)))
    assert copies_of(bench, "long") == [0]
    assert copies_of(bench, *(f"r{i}" for i in range(6))) == [1, 2, 1, 2, 1, 2]
    bench.run()
    # What has ended promises nothing any more.
    bench.add(make_request("next", [1]))
    assert copies_of(bench, "next") == [0]


def test_a_group_stays_together_and_its_prompt_is_computed_once() -> None:
    bench = CopiedBench()
    group = [make_request(f"g{i}", range(24), group="g", max_new=6) for i in range(5)]
    bench.add(make_request("a", [1]), *group[:2], make_request("b", [2]), *group[2:])
    assert set(copies_of(bench, *(f"g{i}" for i in range(5)))) == {1}
    outputs = bench.run()
    for request in group:
        check_output(request, outputs[request.rid])
    assert sum(copy.num_computed for copy in bench.executor.copies) < 24 + 6 * 5 + 2 * 9 + 8
    # Once none of them is left, the group may go elsewhere.
    assert "g" not in bench.scheduler._placement._groups


def test_a_cached_prefix_draws_unless_the_queue_there_is_longer_by_more() -> None:
    bench = CopiedBench(context_length=256)
    bench.add(make_request("a", [9]), make_request("b", range(60), max_new=2))
    assert copies_of(bench, "b") == [1]
    bench.run()
    same = [make_request(f"s{i}", [*range(60), i], max_new=19) for i in range(3)]
    bench.add(*same)
    # 60 tokens are cached there: as many as it may be behind.
    assert copies_of(bench, "s0", "s1", "s2") == [1, 0, 2]
    outputs = bench.run()
    assert outputs["s0"].cached_tokens == 60
    for request in same:
        check_output(request, outputs[request.rid])


def test_what_a_request_is_refused_for_is_the_same() -> None:
    bench = CopiedBench(max_waiting=4)
    bench.add(make_request("a", [1]))
    with pytest.raises(InvalidRequest, match="already in use") as caught:
        bench.add(make_request("a", [2]))
    assert caught.value.field == "rid"
    with pytest.raises(InvalidRequest) as caught:
        bench.add(make_request("b", []))
    bench.add(*(make_request(f"r{i}", [i]) for i in range(3)))
    with pytest.raises(QueueFull, match="4 requests wait"):
        bench.add(make_request("more", [1]))
    assert len(bench.run()) == 4


def test_counts_are_of_all_copies_and_a_step_is_one_of_all() -> None:
    bench = CopiedBench(num_pages=32)
    bench.add(*(make_request(f"r{i}", [i, 2, 3], max_new=4) for i in range(4)))
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.total_pages) == (4, NUM_COPIES * 32)
    assert [len(copy.running) for copy in bench.scheduler.copies] == [2, 1, 1]
    bench.run()
    assert bench.scheduler.stats().num_steps == 4
    assert bench.scheduler.stats().num_output_tokens == 16


def test_a_frame_has_a_plan_of_one_step_for_every_copy() -> None:
    bench = CopiedBench()
    bench.add(make_request("a", range(10), max_new=3))
    plan = bench.step()
    assert plan is not None
    assert [len(each.slots) for each in plan.copies()] == [1, 0, 0]
    assert [each.step for each in plan.copies()] == [0, 0, 0]
    bench.add(make_request("b", [1], max_new=3))
    assert (plan := bench.step()) is not None
    assert [len(each.slots) for each in plan.copies()] == [1, 1, 0]
    assert [each.step for each in plan.copies()] == [1, 1, 1]


def test_masks_of_a_frame_are_split_among_its_copies() -> None:
    bench = CopiedBench()
    allowed = np.array([1, 2, 4], np.int32)
    bench.add(
        make_request("a", [1]),
        make_request("b", [2], allowed_token_ids=allowed),
        make_request("c", [3]),
        make_request("d", [4], allowed_token_ids=allowed),
    )
    plan = bench.scheduler.plan()
    assert plan is not None and plan.waits
    assert first_rows(plan) == [0, 2, 3]
    assert [each.masked.tolist() for each in plan.copies()] == [[1], [0], []]
    rows = [1, 2]
    assert [rows[own] for own in rows_of_copies(rows, plan)] == [[1], [2], []]


def test_after_a_step_that_failed_the_copies_go_on_together() -> None:
    bench = CopiedBench()
    bench.add(*(make_request(f"r{i}", [i, 2], max_new=4) for i in range(2)))
    bench.step()
    plan = bench.scheduler.plan()
    assert plan is not None
    ended = bench.scheduler.fail_all(ErrorInfo(kind="InternalError", message="broken", field=""))
    assert sorted(output.rid for output in ended) == ["r0", "r1"]
    bench.outputs.clear()
    for copy in bench.executor.copies:
        copy._next_step = bench.scheduler._next_step
    requests = [make_request(f"s{i}", [i, 2], max_new=4) for i in range(4)]
    bench.add(*requests)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
