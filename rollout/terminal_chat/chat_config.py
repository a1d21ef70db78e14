"""The options of `chat`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import Device, DType


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk to a server, or to a model in a process of its own. /help in the chat lists commands."""

    url: str = ""
    """Server or router to talk to; by default http://127.0.0.1:30000, unless --model is given."""
    model: str = ""
    """Model to load and talk to, in place of a server: a folder or a .gguf file."""
    api_key: str = ""
    """Key of the server; by default that of the environment variable SLIPSTREAM_API_KEY."""
    system: str = ""
    """The system's turn; /system changes it."""
    temperature: float | None = None
    """Temperature of replies; /temperature changes it. None takes the server's."""
    seed: int | None = None
    """Seed of every reply; /seed changes it. None draws another one each time."""
    max_tokens: int = 1024
    """Most tokens of a reply."""
    logprobs: bool = False
    """Show how likely each token was; /logprobs turns it on and off."""
    device: Device = "auto"
    """Where --model runs."""
    dtype: DType = "auto"
    """What --model computes in."""
    context_length: int | None = None
    """Most tokens of a conversation with --model."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the next reply is asked for with; commands change it. Fields as in `ChatConfig`."""

    system: str
    temperature: float | None
    seed: int | None
    max_tokens: int
    logprobs: bool
