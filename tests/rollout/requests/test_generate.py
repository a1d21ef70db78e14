"""Lists of requests through a replica: order, stop strings, streams, errors that stay alone."""

from collections.abc import Callable, Iterator

import pytest

from engine.errors import InvalidRequest
from engine.protocol import BeginUpdate, Pause, Request, VersionSpan
from rollout.replica.base import Replica
from rollout.requests.generate import Progress, generate, run
from tests.helpers.fake_executor import POISON, expected_tokens
from tests.helpers.replicas import inline, make_request, spawned
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(params=[inline, spawned], ids=["inline", "spawned"])
def replica(request: pytest.FixtureRequest) -> Iterator[Replica]:
    make: Callable[..., Replica] = request.param
    with make() as made:
        yield made


def requests_of(count: int, **sampling: object) -> list[Request]:
    return [make_request(f"r{i}", [i % 50 + 1, 2, i % 250], **sampling) for i in range(count)]


def test_outputs_come_in_the_order_asked(replica: Replica) -> None:
    requests = [
        make_request(f"r{i}", [i + 1, 2], max_new_tokens=1 + (7 * i) % 20) for i in range(50)
    ]
    outputs = generate(replica, requests)
    for i, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        wanted = expected_tokens(request.prompt_ids.tolist(), 1 + (7 * i) % 20)
        assert output.rid == request.rid
        assert output.token_ids.tolist() == wanted


def test_no_requests_no_outputs(replica: Replica) -> None:
    assert generate(replica, []) == []


def test_stop_string_cuts_tokens_logprobs_and_spans(replica: Replica) -> None:
    whole = expected_tokens([1, 2], 30)
    text = TOKENIZER.decode(whole)
    stop = text[10:13]
    end = text.find(stop) + 3
    plain, stopped = generate(
        replica,
        [
            make_request("plain", [1, 2], max_new_tokens=30),
            make_request("stopped", [1, 2], max_new_tokens=30, stop=["\n\n", stop]),
        ],
        tokenizer=TOKENIZER,
    )
    assert plain.token_ids.tolist() == whole
    assert stopped.token_ids.tolist() == whole[:end]
    assert stopped.logprobs.tolist() == plain.logprobs[:end].tolist()
    assert stopped.spans == [VersionSpan(0, 0, end)]
    assert stopped.finish is not None
    assert (stopped.finish.type, stopped.finish.matched) == ("stop", stop)


def test_stop_string_on_the_last_token_is_a_stop(replica: Replica) -> None:
    text = TOKENIZER.decode(expected_tokens([1, 2], 5))
    (output,) = generate(
        replica,
        [make_request("x", [1, 2], max_new_tokens=5, stop=text[3:])],
        tokenizer=TOKENIZER,
    )
    assert output.finish is not None
    assert output.finish.type == "stop"
    assert len(output.token_ids) == 5


def test_streams_join_with_top_and_prompt_logprobs() -> None:
    def request(rid: str, **sampling: object) -> Request:
        made = make_request(rid, [1, 2, 3], max_new_tokens=6, **sampling)
        fields = {f: getattr(made, f) for f in made.__struct_fields__}
        return Request(**{**fields, "top_logprobs": 2, "prompt_logprob_start": 0})

    with inline() as replica:
        whole, streamed = generate(
            replica,
            [request("whole"), request("streamed", stop=["never"])],
            tokenizer=TOKENIZER,
        )
    assert streamed.token_ids.tolist() == whole.token_ids.tolist()
    assert whole.top is not None and streamed.top is not None
    assert streamed.top.ids.tolist() == whole.top.ids.tolist()
    assert len(whole.top.ids) == 6
    assert whole.prompt_logprobs is not None and streamed.prompt_logprobs is not None
    assert streamed.prompt_logprobs.tolist() == whole.prompt_logprobs.tolist()
    assert len(whole.prompt_logprobs) == 2


def test_one_bad_request_does_not_touch_the_others(replica: Replica) -> None:
    requests = [
        make_request("a", [1]),
        make_request("cold", [1], temperature=-1.0),
        make_request("stops", [1], stop=["x"]),
        make_request("b", [2]),
    ]
    outputs = generate(replica, requests)
    kinds = [output.finish.error for output in outputs if output.finish is not None]
    assert kinds == [None, "InvalidRequest", "InvalidRequest", None]
    assert [len(output.token_ids) for output in outputs] == [8, 0, 0, 8]


@pytest.mark.parametrize("prompt", [[-1], [2**31 - 1], [[1, 2]], []], ids=str)
def test_a_prompt_that_is_none_is_refused_also_where_text_is_looked_at(
    replica: Replica, prompt: list[int]
) -> None:
    bad, good = generate(
        replica,
        [make_request("bad", prompt, stop=["x"]), make_request("good", [1], stop=["never"])],
        tokenizer=TOKENIZER,
    )
    assert bad.finish is not None and bad.finish.error == "InvalidRequest"
    assert len(good.token_ids) == 8


def test_a_failed_step_is_reported_and_the_rest_is_run(replica: Replica) -> None:
    (bad,) = generate(replica, [make_request("bad", [POISON, 1])])
    assert bad.finish is not None
    assert bad.finish.error == "OutOfMemory"
    assert len(generate(replica, requests_of(3))) == 3


def test_twice_the_same_id_is_refused_before_anything_runs(replica: Replica) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate(replica, [make_request("a", [1]), make_request("a", [2])])
    assert caught.value.field == "rid"
    assert replica.idle()


def test_a_paused_replica_is_an_error_not_a_hang(replica: Replica) -> None:
    replica.send(Pause())
    with pytest.raises(InvalidRequest, match="Resume"):
        generate(replica, requests_of(1))


def test_more_requests_than_the_window(replica: Replica) -> None:
    requests = requests_of(1500, max_new_tokens=1)
    outputs = generate(replica, requests)
    assert [len(output.token_ids) for output in outputs] == [1] * 1500


def test_a_full_queue_refuses_only_what_does_not_fit() -> None:
    with inline(max_waiting=5) as replica:
        outputs = generate(replica, requests_of(8))
    kinds = [output.finish.error for output in outputs if output.finish is not None]
    assert kinds == [None] * 5 + ["QueueFull"] * 3


def test_progress_counts_to_the_end() -> None:
    seen: list[Progress] = []
    with inline() as replica:
        generate(replica, requests_of(3), on_progress=seen.append)
    assert seen[-1] == Progress(num_done=3, num_requests=3, num_tokens=24)
    assert [p.num_done for p in seen] == sorted(p.num_done for p in seen)


def test_leaving_early_aborts_what_runs(replica: Replica) -> None:
    outputs = run(replica, requests_of(40, max_new_tokens=300), total=40)
    outputs.close()
    outputs = run(
        replica, [make_request("short", [1], max_new_tokens=1), *requests_of(9)], total=10
    )
    assert next(outputs).rid == "short"
    outputs.close()
    while not replica.idle():
        replica.step()
    state = replica.state()
    assert (state.num_running, state.num_waiting) == (0, 0)
    assert len(generate(replica, requests_of(2))) == 2


def test_a_push_between_steps_shows_in_the_spans() -> None:
    with inline() as replica:

        def push(progress: Progress) -> None:
            if replica.state().num_steps == 4:
                replica.update_weights_inproc(BeginUpdate(version=1), [("shift", 1)])

        (output,) = generate(
            replica, [make_request("x", [1, 2], stop=["never"])], tokenizer=TOKENIZER,
            on_progress=push,
        )  # fmt: skip
    assert output.spans == [VersionSpan(0, 0, 4), VersionSpan(1, 4, 8)]


def test_a_replica_that_fails_shows_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of an abort sent to what is left of it."""

    def fail() -> None:
        raise ZeroDivisionError("the cause")

    def left(_: object) -> None:
        raise KeyError(0)

    with inline() as replica:
        monkeypatch.setattr(replica, "step", fail)
        monkeypatch.setattr(replica, "send", left)
        with pytest.raises(ZeroDivisionError, match="the cause"):
            generate(replica, [make_request("a", [1]), make_request("b", [2])])
