"""Lists of requests that come with output tokens, on a replica without a server."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from engine.protocol import Request
from rollout.requests.generate import generate
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.replicas import inline, make_request, overlapped
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = expected_tokens([5], 12)
TEXT = TOKENIZER.decode(IDS)


def going_on(rid: str, ids: list[int], **sampling: object) -> Request:
    request = make_request(rid, [5], **{"max_new_tokens": 12, **sampling})
    return msgspec.structs.replace(request, output_ids=np.array(ids, np.int32))


@pytest.mark.parametrize("make", [inline, overlapped])
def test_a_stop_string_is_found_across_the_cut(make) -> None:
    """Stop string of three tokens, and every cut: before, inside, after it."""
    stop = TEXT[5:8]
    requests = [going_on(str(cut), IDS[:cut], stop=stop) for cut in range(13)]
    with make() as replica:
        outputs = generate(replica, requests, tokenizer=TOKENIZER)
    for cut, output in enumerate(outputs):
        assert (output.finish.type, output.finish.matched) == ("stop", stop)
        assert output.start == min(cut, 8)
        assert output.token_ids.tolist() == IDS[cut:8]
        assert len(output.logprobs) == len(output.token_ids)


def test_what_is_over_costs_no_step() -> None:
    ends = [
        going_on("string", IDS[:9], stop=TEXT[5:8]),
        going_on("token", [*IDS[:4], 299]),
        going_on("length", IDS),
    ]
    with inline() as replica:
        outputs = generate(replica, ends, tokenizer=TOKENIZER)
        assert replica.state().num_steps == 0
        assert replica.idle()
    assert [output.start for output in outputs] == [8, 5, 12]
    assert [output.finish.type for output in outputs] == ["stop", "stop", "length"]
    assert all(len(output.token_ids) == 0 for output in outputs)


@pytest.mark.parametrize("stop", [None, "x"])
@pytest.mark.parametrize("ids", [[300], [-1], [1] * 13, [1] * 700])
def test_bad_tokens_end_their_request_alone(ids: list[int], stop: str | None) -> None:
    good = make_request("good", [5], max_new_tokens=12)
    with inline() as replica:
        bad, whole = generate(replica, [going_on("bad", ids, stop=stop), good], tokenizer=TOKENIZER)
    assert bad.finish.error in ("InvalidRequest", "ContextTooLong")
    assert bad.finish.message.startswith("output_ids")
    assert whole.token_ids.tolist() == IDS


@pytest.mark.parametrize("ids", [[1, 2], np.ones((1, 2), np.int32), np.ones(2)])
def test_what_is_no_list_of_ids_is_refused(ids: object) -> None:
    requests = [
        msgspec.structs.replace(going_on(str(stop), [], stop=stop), output_ids=ids)
        for stop in (None, "x")
    ]
    with inline() as replica:
        for output in generate(replica, requests, tokenizer=TOKENIZER):
            assert output.finish.error == "InvalidRequest"
            assert output.finish.message.startswith("output_ids")
