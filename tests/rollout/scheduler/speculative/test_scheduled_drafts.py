"""Drafts in the scheduler: whom rows draft from, and when they do, step by step."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import SpeculativeConfig
from engine.protocol import ErrorInfo
from tests.helpers.scheduling import Bench, check_output, make_request

PROMPT = [1, 2, 3, 4, 5]


def bench(method: str = "ngram", num_pages: int = 1024, **options: object) -> Bench:
    config = SpeculativeConfig(method=method, draft_tokens=3, pace="counts")
    return Bench(speculative=config, num_pages=num_pages, context_length=1024, **options)


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_draft_from_running_and_finished_samples(overlap: bool) -> None:
    """Again in a second epoch, when only texts of the first are there at first."""
    world = bench(overlap=overlap)
    for epoch in range(2):
        before = world.executor.sources.num_segments
        requests = [
            make_request(f"{epoch}.{i}", PROMPT, max_new=10 + 9 * i, seed=10 * epoch + i)
            for i in range(4)
        ]
        world.add(*requests)
        outputs = world.run()
        for request in requests:
            check_output(request, outputs[request.rid])
        assert world.executor.sources.num_live > 0
        assert world.executor.sources.num_segments > before
    world.add(make_request("other", [9, 9, 9]), make_request("salted", PROMPT, salt="s"))
    live, segments = world.executor.sources.num_live, world.executor.sources.num_segments
    world.run()
    assert world.executor.sources.num_live == live, "another prompt, or salt, is read"
    assert world.executor.sources.num_segments == segments


def test_a_salt_that_spells_a_prompt_is_not_read_with_it() -> None:
    world = bench()
    world.add(make_request("a", [65, 66], salt="s"), make_request("b", [66], salt="s\0A\0\0"))
    world.run()
    assert world.executor.sources.num_live == world.executor.sources.num_segments == 0


def test_a_text_that_is_retracted_and_goes_on_is_kept_once() -> None:
    world = bench(num_pages=24)
    world.add(*(make_request(f"{i}", PROMPT, max_new=80, seed=i) for i in range(3)))
    outputs = world.run()
    assert sum(output.num_retractions for output in outputs.values()) > 1
    writes = [write for plan in world.plans if plan.sources for write in plan.sources.writes]
    # The last one to end is written by no plan.
    assert len(writes) <= 2


def test_texts_of_aborts_by_the_engine_and_of_old_versions_are_not_read() -> None:
    world = bench()
    for version in range(1, 5):
        world.add(make_request(f"old{version}", PROMPT, max_new=20, seed=version))
        world.run()
        world.set_version(version)
    world.add(make_request("cut", PROMPT, max_new=20, seed=9))
    for _ in range(3):
        world.step()
    world.keep(world.scheduler.abort(all=True))
    before = world.executor.sources.num_segments
    world.add(make_request("new", PROMPT, max_new=8, seed=10))
    plan = world.step()
    assert plan is not None
    # Of the four versions before, the text of the first is gone; the one cut off never was there.
    assert world.executor.sources.num_segments == before + 3


def test_after_a_failed_step_every_table_is_set_anew() -> None:
    world = bench()
    world.add(*(make_request(f"a{i}", PROMPT, max_new=30, seed=i) for i in range(3)))
    for _ in range(4):
        world.step()
    world.keep(world.scheduler.fail_all(ErrorInfo(kind="InternalError", message="a step failed")))
    world.add(make_request("b", PROMPT))
    plan = world.step()
    assert plan is not None and plan.sources is not None
    assert not plan.sources.writes
    assert len(plan.sources.ids) == 16 * SpeculativeConfig().num_sources
    assert (plan.sources.ids == -1).all()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("accepted", [False, True])
def test_auto_drafts_where_drafts_come_true(overlap: bool, accepted: bool) -> None:
    world = bench("auto", overlap=overlap)
    world.executor.accepts = lambda seed, position: accepted
    request = make_request("r", PROMPT, max_new=900)
    world.add(request)
    check_output(request, world.run()["r"])
    drafting = np.mean([plan.draft_lens.any() for plan in world.plans])
    # Drafts that cost next to nothing are tried now and then.
    assert drafting > 0.9 if accepted else drafting < 0.2


def test_auto_chooses_the_same_again() -> None:
    chosen = []
    for _ in range(2):
        world = bench("auto")
        world.add(*(make_request(f"{i}", PROMPT, max_new=60 + 20 * i, seed=i) for i in range(6)))
        world.run()
        chosen.append([plan.draft_lens.tolist() for plan in world.plans])
    assert chosen[0] == chosen[1]
