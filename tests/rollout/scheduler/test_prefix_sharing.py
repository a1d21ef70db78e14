"""What is computed once: groups, few-shot prefixes, later turns."""

from __future__ import annotations

import pytest

from engine.protocol import StepPlan
from tests.helpers.scheduling import Bench, check_output, make_request


def add_groups(bench: Bench, prompts: list[list[int]], samples: int, **fields: object) -> list:
    requests = [
        make_request(f"{g}-{i}", prompt, group=f"g{g}", seed=1000 * g + i, **fields)
        for g, prompt in enumerate(prompts)
        for i in range(samples)
    ]
    bench.add(*requests)
    return requests


def prefill_tokens(plans: list[StepPlan], prompts: int) -> list[int]:
    return [int(plan.query_lens.sum()) for plan in plans[:prompts]]


@pytest.mark.parametrize("prompt_len", [1, 3, 4, 5, 8, 9, 11, 16])
def test_samples_of_a_group_compute_the_prompt_once(prompt_len: int):
    bench = Bench(page_size=4, max_step_tokens=256)
    requests = add_groups(bench, [list(range(prompt_len))], 8, max_new=6)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    # The leader computes the prompt, each other sample only its last token; then 5 outputs.
    assert bench.executor.num_computed == prompt_len + 7 + 8 * 5
    assert [outputs[r.rid].cached_tokens for r in requests] == [0] + [prompt_len - 1] * 7


def test_other_samples_wait_for_one_plan_at_most():
    bench = Bench(page_size=4, max_step_tokens=256)
    add_groups(bench, [list(range(10)), list(range(20, 30))], 4)
    bench.run()
    assert prefill_tokens(bench.plans, 2) == [20, 2 + 6]
    assert bench.executor.num_copies == 6


def test_sample_after_a_page_boundary_joins_the_same_step():
    bench = Bench(page_size=4, max_step_tokens=256)
    add_groups(bench, [list(range(9))], 4)
    bench.run()
    assert prefill_tokens(bench.plans, 1) == [9 + 3]
    assert bench.executor.num_copies == 0


def test_samples_wait_while_their_leader_is_still_in_prefill():
    bench = Bench(page_size=4, max_step_tokens=64, max_chunk_tokens=16)
    requests = add_groups(bench, [list(range(50))], 4, max_new=3)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    assert prefill_tokens(bench.plans, 5) == [16, 16, 16, 2, 3 + 1]


def test_nobody_waits_for_a_prefix_that_will_not_be_shared():
    bench = Bench(max_step_tokens=32, max_chunk_tokens=16, policy="fcfs")
    bench.add(make_request("a", range(60), salt="x"), make_request("b", range(60), salt="y"))
    bench.step()
    assert bench.plans[0].query_lens.tolist() == [16, 16], "salts keep prefixes apart"
    bench.scheduler.abort("b")
    bench.set_version(1)
    bench.add(make_request("c", range(60), salt="x"))
    bench.step()
    assert bench.plans[1].query_lens.tolist() == [16, 16], "the old version's KV is of no use"
    bench.run()


def test_groups_share_a_few_shot_prefix_inside_one_step():
    shared = list(range(32))
    prompts = [[*shared, 50 + 2 * g, 51 + 2 * g] for g in range(5)]
    bench = Bench(page_size=4, max_step_tokens=256, max_chunk_tokens=256, max_running=20)
    add_groups(bench, prompts, 4)
    bench.run()
    assert prefill_tokens(bench.plans, 1) == [34 + 4 * 2]


def test_waiting_samples_keep_their_slots():
    bench = Bench(max_running=8, max_step_tokens=256)
    prompts = [[g, *range(30, 40)] for g in range(6)]
    add_groups(bench, prompts, 4, max_new=20)
    bench.step()
    assert len(bench.plans[0].slots) == 2, "two groups of four fill eight slots"
    bench.step()
    assert len(bench.plans[1].slots) == 8
    bench.run()


def test_samples_of_a_group_are_adjacent():
    bench = Bench(max_running=12, max_step_tokens=64)
    groups: dict[int, str] = {}
    prompts = [[g, *range(20 + g, 40)] for g in range(4)]
    requests = [
        make_request(f"{g}-{i}", prompts[g], group=f"g{g}", seed=g * 10 + i, max_new=4 + 3 * i)
        for i in range(4)
        for g in range(4)
    ]
    bench.add(*requests)
    while bench.scheduler.has_work():
        plan = bench.step()
        running = bench.scheduler._running
        for slot in plan.slots.tolist():
            if slot in running._by_slot:
                groups[slot] = running[slot].request.group
        seen = [groups[slot] for slot in plan.slots.tolist()]
        blocks = [name for i, name in enumerate(seen) if i == 0 or seen[i - 1] != name]
        assert len(blocks) == len(set(blocks)), seen
    bench.check_empty()


def test_second_turn_reuses_prompt_and_output():
    bench = Bench(page_size=4)
    bench.add(make_request("a", range(10), max_new=11))
    first = bench.run()["a"]
    turn = [*range(10), *first.token_ids.tolist(), 1, 2, 3]
    request = make_request("b", turn, max_new=4)
    bench.add(request)
    output = bench.run()["b"]
    check_output(request, output)
    # 20 of the 21 tokens have KV: five full pages.
    assert output.cached_tokens == 20


def test_salts_are_kept_apart():
    bench = Bench()
    bench.add(make_request("a", range(20), salt="x"))
    bench.run()
    bench.add(make_request("b", range(20), salt="y"), make_request("c", range(20), salt="x"))
    outputs = bench.run()
    assert outputs["b"].cached_tokens == 0 and outputs["c"].cached_tokens == 19


def test_without_prefix_cache_everything_is_computed():
    bench = Bench(prefix_cache=False, max_step_tokens=256)
    requests = add_groups(bench, [list(range(10))], 4, max_new=3)
    outputs = bench.run()
    for request in requests:
        check_output(request, outputs[request.rid])
    assert bench.executor.num_computed == 4 * 10 + 4 * 2
    assert bench.scheduler.stats().free_pages == 256


def test_prompt_as_large_as_the_pool_drops_its_copy_source():
    bench = Bench(num_pages=4, page_size=4)
    for rid in "ab":
        request = make_request(rid, range(15), max_new=2)
        bench.add(request)
        check_output(request, bench.run()[rid])
    assert bench.outputs["b"][0].cached_tokens == 12
