"""Whatever comes between turns, each comes out as one request with everything before it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.scheduling import check_output, joined, make_request
from tests.helpers.session_turns import SessionBench

pytestmark = pytest.mark.slow

POLICIES = st.sampled_from(["keep", "recompute", "fresh"])
SESSIONS = st.sampled_from("xyz")
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=5)
STEPS = st.one_of(
    st.tuples(st.just("turn"), SESSIONS, PROMPTS, st.integers(1, 6), POLICIES, st.integers(0, 30)),
    st.tuples(st.just("plain"), PROMPTS, st.integers(1, 20)),
    st.tuples(st.just("step"), st.integers(1, 5)),
    st.tuples(st.just("abort"), SESSIONS),
    st.tuples(st.just("update")),
    st.tuples(st.just("flush")),
    st.tuples(st.just("retract")),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(STEPS, max_size=30), st.booleans(), st.integers(12, 40))
def test_turns_in_any_order(steps: list[tuple], overlap: bool, num_pages: int) -> None:
    bench = SessionBench(overlap=overlap, num_pages=num_pages, context_length=48)
    wholes = {}
    for name in "xyz":
        bench.open(name)
    version = 0
    for number, (kind, *more) in enumerate(steps):
        rid = f"r{number}"
        if kind == "turn":
            name, prompt, max_new, policy, cut = more
            session = bench.turns.sessions.get(name)
            at = cut if cut <= len(session.tokens) and cut % 3 == 0 else -1
            if session.rid or len(session.tokens) > 36:
                continue
            request = make_request(
                rid,
                prompt,
                max_new=max_new,
                seed=number,
                session=name,
                kv_policy=policy,
                session_at=at,
            )
            wholes[rid] = bench.whole(request)
            bench.add(request)
        elif kind == "plain":
            prompt, max_new = more
            wholes[rid] = make_request(rid, prompt, max_new=max_new, seed=number)
            bench.add(wholes[rid])
        elif kind == "step":
            for _ in range(more[0]):
                bench.step()
        elif kind == "abort":
            open_rid = bench.turns.sessions.get(more[0]).rid
            bench.keep(bench.scheduler.abort(rids=[open_rid]))
        elif kind == "update":
            version += 1
            bench.set_version(version)
        elif kind == "flush":
            bench.cache.idle.give_up()
        else:
            bench.scheduler.pause("retract")
            bench.scheduler.resume()
    bench.finish()
    for rid, whole in wholes.items():
        output = joined(bench.outputs[rid])
        if output.finish.type != "abort":
            check_output(whole, output)
            bench.check_kv_spans(whole, output)
    bench.cache.idle.drop_all()
    bench.check_empty()
