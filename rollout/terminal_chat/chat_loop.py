"""Read lines, and answer each: a message by a reply, a command by a note."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from engine.config import EngineConfig
from engine.errors import InvalidRequest, SlipstreamError
from rollout.launch import launch
from rollout.terminal_chat.chat_commands import Chat, execute
from rollout.terminal_chat.chat_config import ChatConfig, Settings
from rollout.terminal_chat.painter import Painter
from rollout.terminal_chat.replica_talk import ReplicaTalk
from rollout.terminal_chat.server_talk import ServerTalk
from rollout.terminal_chat.talk import Talk
from rollout.text.tokenizer import load_tokenizer

KEY = "SLIPSTREAM_API_KEY"
"""Environment variable of the server's key."""
_URL = "http://127.0.0.1:30000"
_PROMPT = "> "


def run_chat(config: ChatConfig) -> int:
    """Talk until the input ends or /quit; the exit code: 1 if it came from no terminal and a line
    of it failed, else 0. Raises InvalidRequest naming the option, and what a model that cannot be
    loaded raises."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        raise InvalidRequest("chat needs an input and an output; one is closed", field="stdin")
    if config.temperature is not None and not 0 <= config.temperature < math.inf:
        raise InvalidRequest(
            f"--temperature is {config.temperature}; give 0 or more", field="--temperature"
        )
    settings = Settings(
        # A word of the command line that is no UTF-8 has halves of surrogate pairs.
        system=config.system.encode(errors="replace").decode(),
        temperature=config.temperature,
        seed=config.seed,
        max_tokens=config.max_tokens,
        logprobs=config.logprobs,
    )
    painter = Painter(sys.stdout, sys.stderr)
    interactive = sys.stdin.isatty() and painter.terminal
    with closing(_talk(config)) as talk:
        loop = ChatLoop(talk, Chat(settings), painter)
        if interactive:
            loop.greet()
        try:
            for line in _lines(painter, interactive=interactive):
                loop.line(line)
                if loop.over:
                    break
        except BrokenPipeError:
            # Whoever read the replies has left, as `head` does. Python writes what is left at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    return 0 if interactive or not loop.num_failed else 1


class ChatLoop:
    """A chat, a line at a time. num_failed: lines that were answered by an error."""

    def __init__(self, talk: Talk, chat: Chat, painter: Painter) -> None:
        self.num_failed = 0
        self._talk = talk
        self._chat = chat
        self._painter = painter

    @property
    def over(self) -> bool:
        """Whether a command said to leave."""
        return self._chat.over

    def greet(self) -> None:
        """Say who it is, if it can be reached."""
        try:
            self._painter.note(f"talking to {self._talk.name}; /help lists commands")
        except SlipstreamError as error:
            self._painter.note(f"{_said(error)}; send a message once it is there")

    def line(self, line: str) -> None:
        """Answer one line; an error is a note, and the chat goes on as if the line had not been."""
        text = line.strip()
        try:
            if text.startswith("/") and not text.startswith("//"):
                for told in execute(self._chat, text).split("\n"):
                    self._painter.note(told)
            elif text:
                self._message(text[1:] if text.startswith("//") else text)
        except KeyboardInterrupt:
            # One that came while another was being answered.
            self._painter.end_line()
        except SlipstreamError as error:
            self.num_failed += 1
            self._painter.end_line()
            self._painter.note(_said(error))

    def _message(self, text: str) -> None:
        chat, asked = self._chat, {"role": "user", "content": text}
        pieces: list[str] = []
        stopped = False
        self._painter.begin()
        reply = self._talk.reply([*chat.asked(), asked], chat.settings)
        try:
            with closing(reply):
                for piece in reply:
                    if piece.kind == "answer":
                        pieces.append(piece.text)
                    self._painter.piece(piece)
        except KeyboardInterrupt:
            stopped = True
        self._painter.end(stopped=stopped)
        if pieces or not stopped:
            chat.turns += [asked, {"role": "assistant", "content": "".join(pieces)}]


def _talk(config: ChatConfig) -> Talk:
    if config.url and config.model:
        raise InvalidRequest("give --url or --model, not both", field="--model")
    if not config.model:
        return ServerTalk(config.url or _URL, config.api_key or os.environ.get(KEY, ""))
    engine = EngineConfig(
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        context_length=config.context_length,
    )
    tokenizer = load_tokenizer(config.model)
    return ReplicaTalk(config.model, tokenizer, lambda: launch(engine, process=True))


def _lines(painter: Painter, *, interactive: bool) -> Iterator[str]:
    """Lines of the input until it ends. At a terminal they can be edited, and Ctrl-C clears one."""
    if not interactive:
        yield from sys.stdin
        return
    with suppress(ModuleNotFoundError):
        # Gives `input` its editing and history, where Python was built with it.
        import readline  # noqa: F401

    while True:
        try:
            yield input(_PROMPT)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            painter.note("/quit or Ctrl-D leaves")
        except EOFError:
            sys.stdout.write("\n")
            return


def _said(error: SlipstreamError) -> str:
    named = f" ({error.field})" if error.field else ""
    return f"{type(error).__name__}{named}: {error.message}"
