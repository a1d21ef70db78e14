"""Files of requests without a server: replies, logprobs, samples, and lines that fail."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import DiskFull, EngineDead, InvalidRequest
from rollout.offline import FileReport, Progress, run_file
from rollout.replica.base import Replica
from rollout.text.tokenizer import Tokenizer
from tests.helpers.fake_executor import POISON, expected_tokens
from tests.helpers.file_limit import largest_file
from tests.helpers.replicas import inline, spawned
from tests.helpers.tiny_tokenizer import ids_of, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GREEDY = {"temperature": 0, "max_new_tokens": 6}


def answer(
    folder: Path,
    lines: list[Any],
    *,
    replica: Replica | None = None,
    tokenizer: Tokenizer | None = TOKENIZER,
) -> tuple[list[Any], FileReport]:
    """Run the lines (strings as they are) and read the output back."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "in.jsonl").write_text("\n".join(texts) + "\n")
    with replica or inline() as engine:
        report = run_file(engine, tokenizer, folder / "in.jsonl", folder / "out.jsonl")
    output = (folder / "out.jsonl").read_text().splitlines()
    return [json.loads(line) for line in output], report


def test_a_reply_has_the_keys_of_the_wire(tmp_path: Path) -> None:
    line = {"text": "abc", "sampling_params": GREEDY, "rid": "q", "return_logprob": True}
    (reply,), report = answer(tmp_path, [line])
    ids = expected_tokens(ids_of("abc"), 6)
    assert reply["output_ids"] == ids
    assert reply["text"] == TOKENIZER.decode(ids)
    meta = reply["meta_info"]
    assert meta["id"] == "q"
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 6, 0)
    assert meta["weight_version"] == "0"
    assert meta["weight_versions"] == [{"version": "0", "start": 0, "end": 6}]
    assert [entry[1:] for entry in meta["output_token_logprobs"]] == [[i, None] for i in ids]
    assert meta["output_token_logprobs"][0][0] == pytest.approx(-ids[0] / 100)
    assert "input_token_logprobs" not in meta
    assert "index" not in reply
    assert report == FileReport(num_lines=1, num_errors=0, num_prompt_tokens=3, num_output_tokens=6)


def test_logprobs_with_text_top_and_prompt(tmp_path: Path) -> None:
    line = {
        "text": "abc",
        "sampling_params": GREEDY,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
        "return_prompt_token_ids": True,
    }
    (reply,), _ = answer(tmp_path, [line])
    meta = reply["meta_info"]
    assert [e[2] for e in meta["input_token_logprobs"]] == ["a", "b", "c"]
    assert [e[0] is None for e in meta["input_token_logprobs"]] == [True, False, False]
    assert meta["input_top_logprobs"][0] is None
    assert [len(entries) for entries in meta["input_top_logprobs"][1:]] == [2, 2]
    assert [len(entries) for entries in meta["output_top_logprobs"]] == [2] * 6
    assert meta["output_token_logprobs"][0][2] == reply["text"][0]
    assert reply["prompt_token_ids"] == ids_of("abc")


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_of_named_tokens(tmp_path: Path, top: int) -> None:
    line = {
        "text": "abc",
        "sampling_params": GREEDY,
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top,
        "token_ids_logprob": [9, 4, 9],
        "return_text_in_logprobs": True,
    }
    unasked = {**line, "return_logprob": False}
    (reply, without), _ = answer(tmp_path, [line, unasked])
    meta = reply["meta_info"]
    spelled = [TOKENIZER.decode([token]) for token in (9, 4, 9)]
    row = [
        [pytest.approx(-token / 100), token, text]
        for token, text in zip((9, 4, 9), spelled, strict=True)
    ]
    assert meta["output_token_ids_logprobs"] == [row] * 6
    assert meta["input_token_ids_logprobs"] == [None, row, row]
    assert ("output_top_logprobs" in meta) == bool(top)
    if top:
        assert [len(entries) for entries in meta["output_top_logprobs"]] == [2] * 6
        assert [entries[0][1] for entries in meta["output_top_logprobs"]] == reply["output_ids"]
    assert not [key for key in without["meta_info"] if "logprobs" in key]


@pytest.mark.parametrize("ids", [[4000], [-1], list(range(40)) * 40, "a", [1.5]])
def test_named_tokens_that_are_none_are_refused_by_name(tmp_path: Path, ids: Any) -> None:
    line = {"text": "abc", "return_logprob": True, "token_ids_logprob": ids}
    (reply,), _ = answer(tmp_path, [line])
    assert reply["error"]["field"].startswith("token_ids_logprob")


def test_prompt_logprobs_from_a_later_position(tmp_path: Path) -> None:
    line = {"text": "abcd", "sampling_params": GREEDY, "return_logprob": True}
    (reply,), _ = answer(tmp_path, [{**line, "logprob_start_len": 2}])
    entries = reply["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == ids_of("cd")
    assert all(entry[0] is not None for entry in entries)


def test_entropies_of_a_whole_reply_and_of_one_cut_at_a_stop_string(tmp_path: Path) -> None:
    ids = expected_tokens(ids_of("abc"), 6)
    stop = TOKENIZER.decode(ids)[2:4]
    line = {"text": "abc", "sampling_params": GREEDY, "return_entropy": True}
    lines = [
        line,
        {**line, "sampling_params": {**GREEDY, "stop": [stop]}},
        {**line, "return_entropy": False},
    ]
    (whole, cut, without), _ = answer(tmp_path, lines)
    want = pytest.approx([token / 50 for token in ids])
    assert whole["meta_info"]["output_token_entropy"] == want
    want = pytest.approx([token / 50 for token in ids[:4]])
    assert cut["meta_info"]["output_token_entropy"] == want
    assert "output_token_entropy" not in without["meta_info"]


def test_samples_come_as_a_list(tmp_path: Path) -> None:
    line = {"text": "abc", "sampling_params": {**GREEDY, "n": 3}, "rid": "g"}
    (replies,), report = answer(tmp_path, [line])
    assert [reply["index"] for reply in replies] == [0, 1, 2]
    assert [reply["meta_info"]["id"] for reply in replies] == ["g-0", "g-1", "g-2"]
    assert report.num_output_tokens == 18


def test_stop_string_and_its_trimming(tmp_path: Path) -> None:
    text = TOKENIZER.decode(expected_tokens(ids_of("abc"), 6))
    stop = text[2:4]
    sampling = {**GREEDY, "stop": [stop]}
    lines = [
        {"text": "abc", "sampling_params": sampling},
        {"text": "abc", "sampling_params": {**sampling, "no_stop_trim": True}},
    ]
    (trimmed, kept), _ = answer(tmp_path, lines)
    assert trimmed["text"] == text[:2]
    assert kept["text"] == text[:4]
    assert trimmed["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert trimmed["meta_info"]["completion_tokens"] == 4


def test_stop_token_is_in_the_ids_and_not_in_the_text(tmp_path: Path) -> None:
    ids = expected_tokens(ids_of("abc"), 6)
    sampling = {**GREEDY, "stop_token_ids": [ids[2]]}
    (reply,), _ = answer(tmp_path, [{"text": "abc", "sampling_params": sampling}])
    assert reply["output_ids"] == ids[:3]
    assert reply["text"] == TOKENIZER.decode(ids[:2])
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[2]}


@pytest.mark.parametrize("make", [inline, spawned])
def test_bad_lines_are_answered_and_the_others_go_on(tmp_path: Path, make: Any) -> None:
    good = {"text": "abc", "sampling_params": GREEDY}
    lines: list[Any] = [
        good,
        "{broken",
        {"text": "a", "input_ids": [1]},
        {"text": "a", "sampling_params": {"temperature": -1}},
        {"text": "a", "sampling_params": {"n": 0}},
        {"text": "a", "lora_path": "x"},
        {"text": "x" * 600},
        {"input_ids": [4000]},
        {"text": "a", "sampling_params": GREEDY, "rid": "same"},
        {"text": "b", "sampling_params": GREEDY, "rid": "same"},
        "",
        good,
    ]
    replies, report = answer(tmp_path, lines, replica=make())
    assert len(replies) == len(lines) - 1
    kinds = [reply.get("error", {}).get("kind") for reply in replies]
    invalid = "InvalidRequest"
    assert kinds == [
        None, invalid, invalid, invalid, invalid, "UnsupportedOption", "ContextTooLong",
        invalid, None, invalid, None,
    ]  # fmt: skip
    fields = [reply["error"]["field"] for reply in replies if "error" in reply]
    assert fields == [
        "", "text, input_ids", "temperature", "n", "lora_path", "text", "input_ids", "rid",
    ]  # fmt: skip
    assert replies[0]["output_ids"] == replies[-1]["output_ids"]
    assert (report.num_lines, report.num_errors) == (11, 8)


def test_errors_name_the_line_of_the_input(tmp_path: Path) -> None:
    lines = [
        "",
        '{"text": "a\\u2028b\u2028"}',
        "{broken",
        {"text": "x" * 600},
        '{"text": "a", "text": 1}',
    ]
    replies, _ = answer(tmp_path, lines)
    assert "error" not in replies[0]
    told = [reply["error"]["message"] for reply in replies[1:]]
    for number, message in zip((3, 4, 5), told, strict=True):
        assert message.startswith(f"{tmp_path / 'in.jsonl'}:{number}: "), message
    assert "'text' is there twice" in told[-1]


def test_replies_that_do_not_fit_leave_whole_lines(tmp_path: Path) -> None:
    lines = [{"text": "abc", "sampling_params": {"max_new_tokens": 1 + 40 * i}} for i in range(6)]
    with largest_file(1500), pytest.raises(DiskFull, match=r"out\.jsonl"):
        answer(tmp_path, lines)
    written = (tmp_path / "out.jsonl").read_bytes()
    assert written.endswith(b"\n")
    assert 1 <= len([json.loads(line) for line in written.splitlines()]) < 6


def test_lines_a_full_queue_refuses_are_errors(tmp_path: Path) -> None:
    lines = [{"text": "abc", "sampling_params": GREEDY}] * 8
    replies, report = answer(tmp_path, lines, replica=inline(max_waiting=5))
    assert ["error" in reply for reply in replies] == [False] * 5 + [True] * 3
    assert report.num_errors == 3


def test_an_abort_of_the_engine_keeps_its_reply(tmp_path: Path) -> None:
    (reply,), _ = answer(tmp_path, [{"input_ids": [POISON, 1], "sampling_params": GREEDY}])
    reason = reply["meta_info"]["finish_reason"]
    assert (reason["type"], reason["error"]) == ("abort", "OutOfMemory")
    assert reply["output_ids"] == []


def test_replies_keep_the_input_order(tmp_path: Path) -> None:
    lines = [
        {"input_ids": [i + 1], "sampling_params": {"max_new_tokens": 1 + (5 * i) % 17}}
        for i in range(60)
    ]
    replies, _ = answer(tmp_path, lines)
    lengths = [reply["meta_info"]["completion_tokens"] for reply in replies]
    assert lengths == [1 + (5 * i) % 17 for i in range(60)]


def test_a_model_without_a_tokenizer_answers_in_ids(tmp_path: Path) -> None:
    lines = [{"input_ids": [1], "sampling_params": GREEDY}, {"text": "a"}]
    (reply, refusal), _ = answer(tmp_path, lines, tokenizer=None)
    assert "text" not in reply
    assert reply["output_ids"] == expected_tokens([1], 6)
    assert refusal["error"]["field"] == "text"


def test_progress_ends_at_the_sequences_that_could_run(tmp_path: Path) -> None:
    lines = [{"text": "a", "sampling_params": {**GREEDY, "n": n}} for n in (1, 3)]
    lines.append({"text": "x" * 600, "sampling_params": {"n": 5}})
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    seen: list[Progress] = []
    with inline() as replica:
        run_file(
            replica,
            TOKENIZER,
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            on_progress=seen.append,
        )
    assert seen[-1] == Progress(num_done=4, num_requests=4, num_tokens=24)


def test_an_empty_file(tmp_path: Path) -> None:
    replies, report = answer(tmp_path, [])
    assert replies == []
    assert report.num_lines == 0


def test_no_input_file(tmp_path: Path) -> None:
    with inline() as replica, pytest.raises(InvalidRequest) as caught:
        run_file(replica, TOKENIZER, tmp_path / "absent", tmp_path / "out")
    assert caught.value.field == "input"


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    with inline() as replica, pytest.raises(InvalidRequest) as caught:
        run_file(replica, TOKENIZER, tmp_path / "in.jsonl", tmp_path / "no" / "out")
    assert caught.value.field == "output"


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    source, link = tmp_path / "in.jsonl", tmp_path / "link.jsonl"
    source.write_text("{}\n")
    link.symlink_to(source)
    for output in (source, link):
        with inline() as replica, pytest.raises(InvalidRequest, match="would be lost") as caught:
            run_file(replica, TOKENIZER, source, output)
        assert caught.value.field == "output"
    assert source.read_text() == "{}\n"


def test_a_death_leaves_finished_lines_on_disk(tmp_path: Path) -> None:
    with pytest.raises(EngineDead):
        answer(tmp_path, ["{broken", {"text": "abc"}], replica=spawned("die"))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
