"""A chat by lines: replies, commands, and what goes wrong, against a scripted server."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

import rollout.__main__ as cli
from engine.errors import InvalidRequest
from rollout.terminal_chat.chat_commands import Chat
from rollout.terminal_chat.chat_config import ChatConfig, Settings
from rollout.terminal_chat.chat_loop import KEY, ChatLoop, run_chat
from rollout.terminal_chat.painter import Painter
from rollout.terminal_chat.safe_text import safe
from rollout.terminal_chat.server_talk import ServerTalk
from tests.helpers.chat_servers import USAGE, ChatServer, chunk
from tests.helpers.children import ROOT, child_environment, heed_interrupts

SETTINGS = Settings(system="", temperature=None, seed=None, max_tokens=9, logprobs=False)
HELLO = [chunk("Hel"), chunk("lo"), USAGE, "[DONE]"]


class Terminal(io.StringIO):
    """A text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def talk_to(server: ChatServer, *lines: str, settings: Settings = SETTINGS) -> tuple[str, str, Any]:
    """What a chat of these lines writes, to its output and its notes, and the loop."""
    out, notes = io.StringIO(), io.StringIO()
    talk = ServerTalk(server.url, "")
    loop = ChatLoop(talk, Chat(settings), Painter(out, notes))
    for line in lines:
        loop.line(f"{line}\n")
    talk.close()
    return out.getvalue(), notes.getvalue(), loop


def test_a_conversation_is_sent_whole_and_streamed_back() -> None:
    with ChatServer(HELLO, HELLO) as server:
        out, notes, _ = talk_to(server, "hi", "", "//slash")
    assert out == "Hello\nHello\n"
    assert re.findall(r"^\[7 tokens, [\d.]+ tokens/s, first after [\d.]+ s\]$", notes, re.M)
    assert server.bodies[0] == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "/slash"},
    ]


def test_commands_change_what_is_asked() -> None:
    with ChatServer(HELLO, HELLO, HELLO) as server:
        lines = ["/system be brief", "/seed 7", "/temperature 0.5", "/logprobs", "a", "/undo"]
        more = ["b", "/system", "/seed", "/temperature", "/logprobs", "/reset", "c", "/help"]
        _, notes, loop = talk_to(server, *lines, *more, "/quit")
    first, second, third = server.bodies
    assert (first["seed"], first["temperature"], first["logprobs"]) == (7, 0.5, True)
    system = {"role": "system", "content": "be brief"}
    assert first["messages"] == [system, {"role": "user", "content": "a"}]
    assert second["messages"] == [system, {"role": "user", "content": "b"}]
    assert third["messages"] == [{"role": "user", "content": "c"}]
    assert not {"seed", "temperature", "logprobs"} & third.keys()
    assert "took back: a" in notes and "/temperature X" in notes
    assert loop.over and loop.num_failed == 0


@pytest.mark.parametrize(
    "line,told",
    [
        ("/sed 3", "InvalidRequest (/sed): there is no /sed; did you mean /seed?"),
        ("/xyzzy", "InvalidRequest (/xyzzy): there is no /xyzzy; /help lists all"),
        ("/seed x", "InvalidRequest (/seed): /seed x: give a number from"),
        ("/temperature -1", "InvalidRequest (/temperature): /temperature -1: give a number from"),
        ("/temperature nan", "InvalidRequest (/temperature): /temperature nan: give"),
        ("/undo", "there is nothing to undo"),
    ],
)
def test_a_command_that_cannot_be_done_is_said(line: str, told: str) -> None:
    with ChatServer() as server:
        assert talk_to(server, line)[1].startswith(told)


def test_control_characters_never_reach_the_terminal_raw() -> None:
    bad = "a\x1b[31m\x07\r\x9b\u202eb\x00\tc\n\U0001f469\u200d\U0001f680 \u4f60\ud800"
    assert safe(bad) == (
        "a\\e[31m\\x07\\r\\x9b\\u202eb\\x00\tc\n\U0001f469\u200d\U0001f680 \u4f60\\ud800"
    )
    said = bad.replace("\ud800", "")
    error = json.dumps({"error": {"type": "InvalidRequest", "message": said, "field": "\x1b"}})
    with ChatServer([chunk(said), "[DONE]"], [error]) as server:
        out, notes, loop = talk_to(server, "hi", "again")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out + notes)
    assert "\U0001f469\u200d\U0001f680 \u4f60" in out and "\\e[31m" in out
    assert loop.num_failed == 1 and "InvalidRequest (\\e): a\\e[31m" in notes


def test_tokens_show_how_likely_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = [chunk("Sure", -0.01), chunk(" thing", -3.0), chunk("!", -9.0), USAGE, "[DONE]"]
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with ChatServer(reply, reply) as server:
        assert talk_to(server, "/logprobs", "hi")[0] == "Sure(-0.01) thing(-3.00)!(-9.00)\n"
        out = Terminal()
        loop = ChatLoop(ServerTalk(server.url, ""), Chat(SETTINGS), Painter(out, out))
        loop.line("hi")
    greens, reds = (out.getvalue().find(f"\x1b[{code}m") for code in (32, 31))
    assert 0 <= greens < reds
    assert re.sub("\x1b\\[[0-9;]*m", "", out.getvalue()).startswith("Sure thing!\n[7 tokens")


def test_what_is_thought_is_shown_and_not_sent_again() -> None:
    reply = [chunk("", reasoning_content="hmm "), chunk("yes"), "[DONE]"]
    with ChatServer(reply, HELLO) as server:
        out, _, _ = talk_to(server, "hi", "more")
    assert out.startswith("hmm yes\n")
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "yes"}


def test_a_server_that_dies_in_the_middle_is_a_line_and_the_chat_goes_on() -> None:
    died = json.dumps({"error": {"type": "EngineDead", "message": "leader", "field": "leader"}})
    with ChatServer([chunk("half")], [chunk("x"), died], ["nonsense"], HELLO) as server:
        out, notes, loop = talk_to(server, "one", "two", "three", "four")
    failed = [line for line in notes.splitlines() if line.startswith("EngineDead")]
    assert len(failed) == loop.num_failed == 3 and "(server): no answer from" in failed[0]
    assert out == "half\nx\nHello\n"
    assert server.bodies[3]["messages"] == [{"role": "user", "content": "four"}]


def test_a_server_that_is_not_there_and_comes_back() -> None:
    with ChatServer() as gone:
        pass
    out, notes, loop = talk_to(gone, "hi", "/seed 3")
    assert (out, loop.num_failed) == ("", 1) and "no answer from" in notes and "seed 3" in notes
    with pytest.raises(InvalidRequest, match="no URL"):
        ServerTalk("localhost", "")
    with pytest.raises(InvalidRequest, match="not both"):
        run_chat(ChatConfig(url=gone.url, model="m"))


def test_a_message_that_is_stopped_before_anything_came_is_none() -> None:
    class Slow:
        name = "slow"

        def reply(self, turns: Any, settings: Any) -> Any:
            raise KeyboardInterrupt
            yield

        def close(self) -> None: ...

    out, notes = io.StringIO(), io.StringIO()
    chat = Chat(SETTINGS)
    ChatLoop(Slow(), chat, Painter(out, notes)).line("hi")
    assert (chat.turns, out.getvalue()) == ([], "") and "[stopped, 0 tokens" in notes.getvalue()


def test_the_options_of_chat_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    found = set(re.findall(r"--([a-z][a-z-]*[a-z])\b(?!-)", capsys.readouterr().out))
    wanted = {"url", "model", "api-key", "system", "temperature", "seed", "max-tokens", "device"}
    assert found - {"no-logprobs", "help"} == wanted | {"logprobs", "dtype", "context-length"}


def test_a_pipe_is_answered_line_by_line_and_an_interrupt_stops_the_reply_alone() -> None:
    with ChatServer([chunk("begun"), "wait"], HELLO, [chunk("cut")]) as server:
        chat = subprocess.Popen(
            [sys.executable, "-m", "rollout", "chat", "--url", server.url, "--system", "s"],
            cwd=ROOT,
            env=child_environment(**{KEY: "secret"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            preexec_fn=heed_interrupts,
        )
        assert chat.stdin and chat.stdout and chat.stderr
        chat.stdin.write(b"one\n")
        assert os.read(chat.stdout.fileno(), 100) == b"begun"
        chat.send_signal(signal.SIGINT)
        out, notes = chat.communicate(b"tw\xffo\nthree\n", timeout=60)
    assert out.decode() == "\nHello\ncut\n"
    assert b"[stopped, 1 tokens" in notes and b"EngineDead (server)" in notes
    assert chat.returncode == 1, "a line of the pipe failed"
    assert server.keys and set(server.keys) == {"Bearer secret"}
    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "begun"},
        {"role": "user", "content": "tw\ufffdo"},
    ]


def test_a_text_with_line_ends_of_unicode_is_one_piece() -> None:
    text = "a\u2028b\u2029c\x85d"
    frame = json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False)
    with ChatServer([frame, "[DONE]"]) as server:
        out, _, loop = talk_to(server, "hi")
    assert (out, loop.num_failed) == ("a\\u2028b\\u2029c\\x85d\n", 0)


@pytest.mark.parametrize(
    "frame",
    [
        "[1]",
        '"x"',
        '{"choices": 5}',
        '{"choices": [{"delta": {"content": 5}}]}',
        '{"choices": [{"logprobs": {"content": [{"token": "a"}]}}]}',
        '{"usage": {}}',
        "[" * 5000,
    ],
)
def test_a_reply_of_another_form_is_a_line(frame: str) -> None:
    with ChatServer([frame], HELLO) as server:
        out, notes, loop = talk_to(server, "hi", "again")
    assert (out, loop.num_failed) == ("Hello\n", 1)
    assert notes.startswith("EngineDead (server): what came is no reply of a server")


def test_what_chat_cannot_do_is_said_by_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="--temperature is nan"):
        run_chat(ChatConfig(temperature=math.nan))
    with pytest.raises(InvalidRequest, match="control character") as caught:
        run_chat(ChatConfig(api_key="sesame\n"))
    assert "sesame" not in str(caught.value) and caught.value.field == "api_key"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InvalidRequest, match="one is closed"):
        run_chat(ChatConfig())


def test_a_reader_that_leaves_ends_the_chat_without_a_word() -> None:
    with ChatServer(HELLO, HELLO) as server:
        chat = subprocess.Popen(
            [sys.executable, "-m", "rollout", "chat", "--url", server.url, "--system", b"\xff"],
            cwd=ROOT,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert chat.stdout
        chat.stdout.close()
        chat.stdout = None
        _, notes = chat.communicate(b"one\ntwo\n", timeout=60)
    assert (chat.returncode, notes) == (1, b"")
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "?"}
