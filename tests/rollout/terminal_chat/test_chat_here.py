"""A chat with a model in a process of its own, one at a terminal, and one with a whole server."""

import asyncio
import io
import os
import pty
import re
import subprocess
import sys

import pytest

from rollout.replica.spawned import ProcessReplica
from rollout.terminal_chat.chat_commands import Chat
from rollout.terminal_chat.chat_config import ChatConfig, Settings
from rollout.terminal_chat.chat_loop import ChatLoop, run_chat
from rollout.terminal_chat.painter import Painter
from rollout.terminal_chat.replica_talk import ReplicaTalk
from rollout.terminal_chat.server_talk import ServerTalk
from tests.helpers.chat_servers import USAGE, ChatServer, chunk
from tests.helpers.children import ROOT, child_environment
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.live_servers import live
from tests.helpers.replicas import spawned
from tests.helpers.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SETTINGS = Settings(system="", temperature=0.0, seed=1, max_tokens=6, logprobs=False)


def expected(*turns: str) -> str:
    """What the fake model says to a conversation."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return TOKENIZER.decode(expected_tokens(TOKENIZER.apply_chat_template(messages), 6))


class Interrupting(io.StringIO):
    """An output at which somebody presses Ctrl-C once something is there."""

    armed = True

    def flush(self) -> None:
        if self.armed and self.getvalue():
            self.armed = False
            raise KeyboardInterrupt


def test_a_model_is_talked_to_in_a_process_that_may_die_and_be_started_again() -> None:
    started: list[ProcessReplica] = []

    def launched() -> ProcessReplica:
        started.append(spawned())
        return started[-1]

    talk = ReplicaTalk("fake", TOKENIZER, launched)
    out, notes = io.StringIO(), io.StringIO()
    loop = ChatLoop(talk, Chat(SETTINGS), Painter(out, notes))
    first = expected("hi")
    loop.line("hi")
    loop.line("/logprobs")
    loop.line("more")
    shown = re.sub(r"\(-[\d.]+\)", "", out.getvalue())
    assert shown == f"{first}\n{expected('hi', first, 'more')}\n"
    assert len(re.findall(r"\(-[\d.]+\)", out.getvalue())) == 6
    loop.line("y" * 2000)
    assert "ContextTooLong" in notes.getvalue()
    started[0]._process.kill()
    loop.line("lost")
    assert "EngineDead" in notes.getvalue()
    loop.line("/reset")
    loop.line("/logprobs")
    loop.line("hi")
    assert out.getvalue().endswith(f"{first}\n") and len(started) == 2
    painter = Painter(stopped := Interrupting(), notes)
    ChatLoop(talk, Chat(Settings(**{**vars_of(SETTINGS), "max_tokens": 400})), painter).line("hi")
    assert "[stopped, " in notes.getvalue() and stopped.getvalue()
    assert started[1].state().num_running == 0
    talk.close()


def vars_of(settings: Settings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in Settings.__dataclass_fields__}


def test_a_server_of_this_project_says_the_same() -> None:
    out = io.StringIO()

    def talk_to(url: str) -> None:
        talk = ServerTalk(url, "")
        loop = ChatLoop(talk, Chat(SETTINGS), Painter(out, io.StringIO()))
        for line in ("hi", "/logprobs", "more"):
            loop.line(line)
        assert loop.num_failed == 0
        talk.close()

    async def there() -> None:
        async with live() as found:
            await asyncio.to_thread(talk_to, found.url)

    asyncio.run(there())
    first = expected("hi")
    shown = re.sub(r"\(-[\d.]+\)", "", out.getvalue())
    assert shown == f"{first}\n{expected('hi', first, 'more')}\n"
    assert len(re.findall(r"\(-[\d.]+\)", out.getvalue())) == 6


def test_a_terminal_has_a_prompt_and_ctrl_d_leaves() -> None:
    main, side = pty.openpty()
    with ChatServer([chunk("Hel"), chunk("lo"), USAGE, "[DONE]"]) as server:
        chat = subprocess.Popen(
            [sys.executable, "-m", "rollout", "chat", "--url", server.url],
            cwd=ROOT,
            env=child_environment(TERM="xterm", NO_COLOR="1"),
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
        )
        os.close(side)
        shown = _until(main, "> ")
        assert "talking to scripted at http://" in shown
        os.write(main, b"hi\n")
        assert "Hello\r\n[7 tokens" in _until(main, "> ")
        os.write(main, b"\x04")
        assert chat.wait(60) == 0
    os.close(main)


def _until(main: int, text: str) -> str:
    shown = ""
    while not shown.endswith(text):
        shown += os.read(main, 1000).decode()
    return shown


@pytest.mark.slow
def test_the_default_model_chats_from_a_pipe(
    default_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Name a colour.\n/undo\nName a colour.\n"))
    config = ChatConfig(model=default_model, device="cpu", seed=1, max_tokens=6, context_length=256)
    assert run_chat(config) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and len(first) > 3
