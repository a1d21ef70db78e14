"""Turns of a session on a real model: the tokens and log-probabilities of one whole request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from engine.protocol import CloseSession, GetSession, OpenSession
from tests.helpers.engines import drain, make_replica, request
from tests.helpers.near_edges import on_an_edge
from tests.helpers.tiny_models import write_tiny

pytestmark = pytest.mark.slow

TURNS = [list(range(5, 18)), [40], [41, 42, 43], [7] * 9]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_turns_are_parts_of_one_request(tmp_path: Path, prefix_cache: bool) -> None:
    model = write_tiny(tmp_path)
    with (
        make_replica(tmp_path, prefix_cache=prefix_cache) as replica,
        make_replica(tmp_path, prefix_cache=False) as other,
    ):
        replica.send(OpenSession(session="s"))
        have: list[int] = []
        for number, ids in enumerate(TURNS):
            turn = request(f"t{number}", ids, seed=number, max_new_tokens=11)
            replica.submit([replace(turn, session="s")])
            got = drain(replica)[turn.rid]
            # Nothing but the new tokens is computed; the last was sampled and never read.
            assert got.cached_tokens == max(0, len(have) - 1)
            whole = request(turn.rid, [*have, *ids], seed=number, max_new_tokens=11)
            other.submit([whole])
            want = drain(other)[turn.rid]
            different = np.flatnonzero(got.token_ids != want.token_ids)
            if len(different):
                before = want.token_ids[: int(different[0])].tolist()
                assert on_an_edge(model, whole, before), f"turn {number} differs"
            else:
                np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
            have = [*have, *ids, *got.token_ids.tolist()]
            state = replica.send(GetSession(session="s")).session
            assert state is not None and state.token_ids.tolist() == have
        replica.send(CloseSession(session="s"))
        found = replica.state()
        assert (found.held_pages, found.num_sessions) == (0, 0)
        assert found.free_pages + found.cached_pages == found.total_pages
