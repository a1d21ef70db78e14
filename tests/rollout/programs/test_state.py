"""States of prompt programs on an engine of this process: text, turns, forks, choices."""

import asyncio
import math
from typing import Any

import msgspec
import pytest

from engine.errors import ContextTooLong, InvalidRequest, UnsupportedOption
from engine.protocol import GenerateRequest, SamplingParams
from rollout.program import BranchFailed, Generated, Runner, Selected, State
from rollout.programs.backends.replica_backend import ReplicaBackend
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.program_engines import seeded_replica
from tests.helpers.replicas import inline
from tests.helpers.text_models import fake_text_model
from tests.helpers.tiny_tokenizer import IM_END_ID, ids_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PREFIX = "x" * 200


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fake_text_model(tmp_path_factory.mktemp("model"))


def run(program: Any, *args: Any, model: str = "fake", **named: Any) -> Any:
    with inline(model) as replica:
        found = Runner.of_replica(replica, TOKENIZER).run(program, *args, **named)
        assert replica.idle()
        return found


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_text_goes_on_by_the_tokens_that_were_sampled() -> None:
    async def program(s: State) -> State:
        s.add("ab", "c")
        await s.gen("first", max_new_tokens=5)
        s.add("d")
        await s.gen("second", max_new_tokens=3)
        return s

    s = run(program)
    first, second = s["first"], s["second"]
    assert first.token_ids == expected_tokens(ids_of("abc"), 5)
    assert second.token_ids == expected_tokens([*ids_of("abc"), *first.token_ids, *ids_of("d")], 3)
    assert s.token_ids == [*ids_of("abc"), *first.token_ids, *ids_of("d"), *second.token_ids]
    assert s.text == f"abc{first}d{second}"
    assert (first.finish, first.prompt_tokens, len(first.logprobs)) == ("length", 3, 5)
    assert first.weight_versions == [{"version": "0", "start": 0, "end": 5}]
    assert set(s.variables) == {"first", "second"}


def test_turns_are_written_once_and_replies_stay_as_they_were_sampled() -> None:
    async def program(s: State) -> tuple[list[list[int]], State]:
        seen = []
        s.system("be brief")
        for number in range(3):
            s.user(f"question {number}")
            await s.gen(f"a{number}", max_new_tokens=6)
            seen.append(s.token_ids)
        return seen, s

    seen, s = run(program)
    texts = [s[f"a{number}"] for number in range(3)]
    prompt = encoded(
        TOKENIZER.render_chat(
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question 0"}]
        )
    )
    assert seen[0] == prompt + texts[0].token_ids
    turn = encoded("<|im_end|>\n<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\n")
    assert seen[1] == seen[0] + turn + texts[1].token_ids
    assert seen[2][: len(seen[1])] == seen[1]
    # All but what is on the page of the reply's last token, whose KV nobody computed.
    assert len(seen[1]) - 4 <= texts[2].cached_tokens < len(seen[1])


def test_a_reply_of_several_pieces_is_one_turn() -> None:
    async def program(s: State) -> State:
        s.user("q")
        with s.reply():
            s.add("I say ")
            await s.select("word", ["yes", "no"])
            s.add(", ")
            await s.gen("why", max_new_tokens=4)
        s.user("r")
        await s.gen("more", max_new_tokens=2)
        return s

    s = run(program)
    said = f"I say {s['word']}, {s['why']}"
    assert s.text == (
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
        f"<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n{s['more']}"
    )


def test_a_stop_string_and_what_lies_behind_it_are_not_gone_on_from() -> None:
    async def program(s: State, stop: str) -> State:
        s.add("abc")
        await s.gen("x", max_new_tokens=20, stop=[stop])
        return s

    whole = TOKENIZER.decode(expected_tokens(ids_of("abc"), 20))
    stop = whole[7:10]
    s = run(program, stop)
    assert s["x"].finish == "stop" and s["x"].matched == stop
    assert s["x"].text == whole[: whole.index(stop)]
    assert s.token_ids == ids_of("abc" + s["x"].text)


def test_a_stop_token_is_in_the_variable_and_not_in_the_text() -> None:
    reply = expected_tokens(ids_of("abc"), 4)

    async def program(s: State) -> State:
        s.add("abc")
        await s.gen("x", max_new_tokens=20, stop_token_ids=[reply[3]])
        return s

    s = run(program)
    assert s["x"].token_ids == reply
    assert s.token_ids == ids_of("abc") + reply[:3]


def test_branches_share_what_is_in_the_cache() -> None:
    async def program(s: State, warm: bool) -> list[Generated]:
        s.add(PREFIX)
        if warm:
            await s.gen("start", max_new_tokens=1)

        async def step(branch: State, text: str) -> Generated:
            branch.add(text)
            return await branch.gen("x", max_new_tokens=4)

        return await s.fork(6).run(step, list("abcdef"))

    for warm, num_computing in ((True, 0), (False, 1)):
        found = run(program, warm)
        reused = sorted(reply.cached_tokens / len(PREFIX) for reply in found)
        assert len({reply.text for reply in found}) == 6
        assert all(share >= 0.95 for share in reused[num_computing:]), reused


def test_branches_have_seeds_and_variables_of_their_own() -> None:
    async def program(s: State) -> tuple[list[State], State]:
        s.add("abc")
        await s.gen("x", max_new_tokens=2)

        async def step(branch: State) -> State:
            await branch.gen("y", max_new_tokens=4)
            return branch

        found = await s.fork(3).run(step)
        s.join(found[1])
        return found, s

    with seeded_replica() as replica:
        branches, s = Runner.of_replica(replica, TOKENIZER).run(program)
    assert len({branch["y"].text for branch in branches}) == 3
    assert s.token_ids == branches[1].token_ids and s["y"] is branches[1]["y"]
    assert s["x"] is branches[0]["x"]


def test_a_draw_is_repeated_by_its_seed_alone_and_in_a_batch() -> None:
    async def program(s: State, text: str) -> tuple[str, int, str]:
        s.add(text)
        first = await s.gen("x", max_new_tokens=6)
        return first.text, first.seed, (await s.gen("y", max_new_tokens=6, seed=5)).text

    with seeded_replica() as replica:
        runner = Runner.of_replica(replica, TOKENIZER, seed=3)
        batch = runner.run_batch(program, [{"text": "abc"}] * 3)
        alone = runner.run(program, "abc")
        other = runner.run(program, "abc", seed=4)
        wire = GenerateRequest(
            input_ids=ids_of("abc"),
            sampling_params=SamplingParams(max_new_tokens=6, sampling_seed=alone[1]),
        )

        async def by_hand() -> str | None:
            async with ReplicaBackend(replica, TOKENIZER).open() as session:
                return (await session.generate(wire)).text

        assert asyncio.run(by_hand()) == alone[0]
    assert batch[0] == alone
    assert len({text for text, _, _ in [*batch, other]}) == 4


def test_the_likeliest_choice_by_the_logprobs_of_its_tokens() -> None:
    choices = ["red", "green", "z"]

    async def program(s: State, **options: Any) -> Selected:
        s.add(PREFIX)
        found = await s.select("color", choices, **options)
        assert s.text == PREFIX + found.text and s["color"] is found
        return found

    with inline() as replica:

        async def by_hand() -> list[float]:
            async with ReplicaBackend(replica, TOKENIZER).open() as session:
                sums = []
                for choice in choices:
                    wire = GenerateRequest(
                        input_ids=ids_of(PREFIX + choice),
                        sampling_params=SamplingParams(max_new_tokens=0),
                        return_logprob=True,
                        logprob_start_len=0,
                    )
                    meta = (await session.generate(wire)).meta_info
                    entries = meta["input_token_logprobs"][-len(choice) :]
                    assert [token_id for _, token_id, _ in entries] == ids_of(choice)
                    sums.append(sum(logprob for logprob, _, _ in entries))
                return sums

        sums = asyncio.run(by_hand())
        runner = Runner.of_replica(replica, TOKENIZER)
        found, mean = runner.run(program), runner.run(program, normalise="tokens")
    assert found.logprobs == pytest.approx(sums)
    assert found.index == sums.index(max(sums)) and found.text == choices[found.index]
    means = [total / len(text) for total, text in zip(sums, choices, strict=True)]
    assert mean.index == means.index(max(means))
    assert found.num_tokens == [3, 5, 1]
    assert found.cached_tokens / (3 * len(PREFIX)) > 0.95, "the prefix was computed before"


class Size(msgspec.Struct):
    big: bool


def test_what_a_text_has_to_be(text_model: str) -> None:
    async def program(s: State) -> State:
        s.add("abc")
        await s.gen("digits", regex="[0-9]{4}")
        await s.gen("word", choices=["left", "right"])
        await s.gen("size", returns=Size)
        await s.gen("rule", ebnf='root ::= "a" "b"')
        await s.gen("schema", json_schema={"const": 7})
        return s

    s = run(program, model=text_model)
    assert s["digits"].text.isdecimal() and len(s["digits"].text) == 4
    assert s["word"].text in ("left", "right")
    assert isinstance(s["size"].value, Size)
    assert (s["rule"].text, s["schema"].text) == ("ab", "7")


@pytest.mark.parametrize(
    "kind,field,words",
    [
        (InvalidRequest, "x.temperatur", {"temperatur": 1.0}),
        (InvalidRequest, "x.temperature", {"temperature": -1.0}),
        (InvalidRequest, "x.max_new_tokens", {"max_new_tokens": "many"}),
        (InvalidRequest, "x.stop", {"stop": {1}}),
        (UnsupportedOption, "x.n", {"n": 2}),
        (InvalidRequest, "x.ebnf", {"ebnf": "a", "regex": "b"}),
        (InvalidRequest, "x.grammar", {"regex": "("}),
        (InvalidRequest, "x.returns", {"returns": object()}),
        (InvalidRequest, "x.value", {"returns": Size, "max_new_tokens": 3}),
    ],
)
def test_a_step_that_is_refused_names_its_variable_and_changes_nothing(
    kind: type[Exception], field: str, words: dict[str, Any], text_model: str
) -> None:
    async def program(s: State) -> str:
        s.user("abc")
        before = s.token_ids
        with pytest.raises(kind) as caught:
            await s.gen("x", **words)
        assert caught.value.field.split("[")[0].removesuffix(".source") == field
        assert str(caught.value).startswith("x: ")
        assert s.token_ids == before and not s.variables
        return (await s.gen("y", max_new_tokens=2)).text

    assert len(run(program, model=text_model)) == 2


def test_what_a_state_cannot_do_is_said() -> None:
    async def program(s: State) -> None:
        for wrong, field in [
            (lambda: s["none"], "none"),
            (lambda: s.fork(0), "fork"),
            (lambda: s.reply().__enter__(), "reply"),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                wrong()
            assert caught.value.field == field
        with pytest.raises(InvalidRequest, match="nothing to go on from"):
            await s.gen("x")
        s.user("q")
        with pytest.raises(InvalidRequest, match="within `with state"):
            s.add("text")
        other = s.fork(1)[0]
        s.user("more")
        with pytest.raises(InvalidRequest, match="does not begin with"):
            s.join(other)
        with pytest.raises(ContextTooLong):
            other.user("y" * 600)
            await other.gen("long")
        for choices in ([], ["a", "a"], [""]):
            with pytest.raises(InvalidRequest) as caught:
                await s.select("which", choices)
            assert caught.value.field == "which.choices"
        started = asyncio.ensure_future(s.gen("slow", max_new_tokens=50))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="still generating 'slow'"):
            s.user("too early")
        await started

    run(program)

    async def text(s: State) -> None:
        s.add("text")
        s.user("q")

    with pytest.raises(InvalidRequest, match="began with text"):
        run(text)


def test_a_failed_branch_is_named_and_ends_the_others() -> None:
    async def inner(branch: State, size: int) -> None:
        branch.add("y" * size)
        await branch.gen("deep", max_new_tokens=200)

    async def outer(branch: State, size: int) -> None:
        await branch.fork(2).run(inner, [1, size])

    async def program(s: State) -> None:
        s.add("abc")
        await s.fork(3).run(outer, [1, 1000, 1])

    with inline() as replica:
        with pytest.raises(BranchFailed) as caught:
            Runner.of_replica(replica, TOKENIZER).run(program)
        assert replica.idle()
        assert replica.state().num_output_tokens < 5 * 50, "the others were ended"
    assert caught.value.field == "branch 1 of fork 0 of the program"
    assert "branch 1 of fork 0 of a branch of the program: ContextTooLong (deep" in str(
        caught.value
    )
    assert isinstance(caught.value.__cause__, BranchFailed)


def test_an_error_of_the_program_itself_is_raised_with_a_note() -> None:
    async def step(branch: State) -> None:
        raise KeyError("mine")

    async def program(s: State) -> None:
        await s.fork(2).run(step)

    with pytest.raises(KeyError) as caught:
        run(program)
    assert caught.value.__notes__ == ["in branch 0 of fork 0 of the program"]

    async def uneven(s: State) -> None:
        await s.fork(2).run(step, [1])

    with pytest.raises(InvalidRequest, match="1 items for 2 branches"):
        run(uneven)


def test_a_template_that_tells_no_bridge_is_refused_by_name() -> None:
    tokenizer = tiny_tokenizer(
        template="{% for m in messages %}{{ m.content | upper }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )

    async def program(s: State) -> None:
        s.user("q")
        await s.gen("a", max_new_tokens=2)
        s.user("r")
        await s.gen("b", max_new_tokens=2)

    with inline() as replica, pytest.raises(InvalidRequest, match=r"b: .*\(user\)") as caught:
        Runner.of_replica(replica, tokenizer).run(program)
    assert caught.value.field == "b.messages"
    assert IM_END_ID not in ids_of("q")


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"choices": "yes"}, "choices"),
        ({"choices": [1, 2]}, "choices"),
        ({"choices": 5}, "choices"),
        ({"json_schema": {"a": object()}}, "json_schema"),
        ({"seed": "a"}, "sampling_seed"),
        ({"seed": 1.5}, "sampling_seed"),
        ({"seed": 1 << 70}, "sampling_seed"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": -math.inf}, "top_p"),
        ({"regex": 5}, "grammar.source"),
    ],
)
def test_words_of_other_types_are_refused_by_their_field(words: dict[str, Any], field: str) -> None:
    async def program(s: State) -> None:
        s.add("text")
        with pytest.raises(InvalidRequest) as caught:
            await s.gen("x", max_new_tokens=2, **words)
        assert caught.value.field == f"x.{field}"
        assert len((await s.gen("x", max_new_tokens=2)).token_ids) == 2

    run(program)


def test_steps_take_what_they_say_and_name_what_they_do_not() -> None:
    async def program(s: State) -> None:
        s.add("text")
        for wrong, field in [
            (lambda: s.add(5), "add"),
            (lambda: s.fork("3"), "fork"),
            (lambda: s.fork(1.5), "fork"),
        ]:
            with pytest.raises(InvalidRequest) as caught:
                wrong()
            assert caught.value.field == field
        for choices in ("yes", None, [1]):
            with pytest.raises(InvalidRequest, match="give a list of one text") as caught:
                await s.select("x", choices)
            assert caught.value.field == "x.choices"
        with pytest.raises(InvalidRequest, match="one of none, tokens"):
            await s.select("x", ["a", "b"], normalise="mean")
        assert (await s.select("x", (c for c in "ab"))).text in ("a", "b")
        with pytest.raises(BranchFailed, match="grow is no async function: it returned int"):
            await s.fork(1).run(grow, (n for n in range(1)))

    def grow(branch: State, number: int) -> int:
        return number

    run(program)
    with pytest.raises(InvalidRequest, match="grow is no async function"):
        run(grow, 1)
