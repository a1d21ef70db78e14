"""Options of a data set of one's own, and of how its chats are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Columns and splits of a task that is a file or folder, and the chat around every prompt."""

    prompt_column: str | None = None
    """Column of the prompt: a text, or a list of messages {"role", "content"}. A dot leads into
    an object. None takes prompt, question, problem or messages, whichever one is there."""
    answer_column: str | None = None
    """Column of the answer, e.g. reward_model.ground_truth. None takes answer, solution or
    ground_truth, whichever one is there."""
    answer_pattern: str | None = None
    """Regular expression whose last match in the answer's column is the answer (its first group,
    if it has one), e.g. '#### (.+)'."""
    train_split: str | None = None
    """Split to train on, of a folder that has several; None takes train, or the only one."""
    heldout: str | None = None
    """What is held out: a split of the folder, another file or folder, or 1/N of the prompts by a
    hash; None holds out 1/8."""
    system_prompt: str | None = None
    """System message before every prompt: a text, or @FILE."""
    chat_template_kwargs: str | None = None
    """JSON object of variables for the model's chat template, e.g. '{"enable_thinking": false}'."""


ONLY_OF_FILES = ("prompt_column", "answer_column", "answer_pattern", "train_split", "heldout")
"""Options that say nothing to a task that is not read from a file."""
