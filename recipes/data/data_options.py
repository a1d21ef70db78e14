"""Options of a data set of one's own, and of how its chats are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TrainOn = Literal["all", "last"]


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Columns of a task that is a file or folder, and the chat around every prompt."""

    prompt_column: str | None = None
    """Column of the prompt: a text, or a list of messages {"role", "content"}. A dot leads into
    an object. None takes prompt, question, problem or messages, whichever one is there."""
    answer_column: str | None = None
    """Column of the answer, e.g. reward_model.ground_truth. None takes answer, solution or
    ground_truth, whichever one is there."""
    answer_pattern: str | None = None
    """Regular expression whose last match in the answer's column is the answer (its first group,
    if it has one), e.g. '#### (.+)'."""
    system_prompt: str | None = None
    """System message before every prompt: a text, or @FILE."""
    chat_template_kwargs: str | None = None
    """JSON object of variables for the model's chat template, e.g. '{"enable_thinking": false}'."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(ColumnOptions):
    """Columns and splits of a task that is a file or folder, and the chat around every prompt."""

    train_split: str | None = None
    """Split to train on, of a folder that has several; None takes train, or the only one."""
    heldout: str | None = None
    """What is held out: a split of the folder, another file or folder, or 1/N of the prompts by a
    hash; None holds out 1/8."""


ONLY_OF_FILES = ("prompt_column", "answer_column", "answer_pattern", "train_split", "heldout")
"""Options that say nothing to a task that is not read from a file."""


@dataclass(frozen=True, kw_only=True)
class SftDataOptions:
    """Columns and splits of a task that is a file or folder, and the chat around its prompts."""

    prompt_column: str | None = None
    """Column of a whole conversation of messages {"role", "content"}, or, beside a completion's, of
    the prompt: a text or messages. None takes messages, prompt, question, problem or instruction,
    whichever one is there."""
    completion_column: str | None = None
    """Column of what is to be said after the prompt: a text, or one assistant message. None takes
    completion, response or output, whichever one is there, else answer or solution; a conversation
    needs none."""
    train_on: TrainOn = "all"
    """Learn every turn of the assistant in a conversation, or the last one alone."""
    train_split: str | None = None
    """Split to train on, of a folder that has several; None takes train, or the only one."""
    heldout: str | None = None
    """What is held out: a split of the folder, another file or folder, or 1/N of the prompts by a
    hash; None holds out 1/8."""
    system_prompt: str | None = None
    """System message before every conversation: a text, or @FILE."""
    chat_template_kwargs: str | None = None
    """JSON object of variables for the model's chat template."""
