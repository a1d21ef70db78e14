"""Options of the reward, and what is wrong with them that can be told at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engine.errors import InvalidRequest

MODEL, CLASSIFY = "model:", "classify:"
"""What the name of a reward model begins with: one of a folder, one behind a URL."""


@dataclass(frozen=True, kw_only=True)
class GraderOptions:
    """What grades the replies."""

    reward: tuple[str, ...] = ()
    """What grades the replies; several, behind one flag or each behind its own, are added up:
    FILE.py:FUNCTION or module:function of yours, an http:// address, judge:URL of an API like
    OpenAI's, model:FOLDER of a reward model (a sequence classifier), classify:URL of a server of
    one, code for programs that are run against the data's column tests, task for the task's own
    (the default)."""
    reward_timeout: float = 30.0
    """Seconds for one reply by a function of yours or the server of a reward model, one request to
    a service, one vote of a judge."""
    judge_model: str | None = None
    """Model that the judge's server is asked for; None takes its first."""
    judge_prompt: str | None = None
    """File with the judge's prompt, which says $question, $answer, $reply, or $COLUMN of the data;
    None takes one of ours."""
    judge_votes: int = 1
    """Votes of the judge on each reply, averaged."""
    judge_schema: bool = False
    """Ask the judge's server for replies of a JSON schema (response_format), which it has to
    serve."""
    judge_labels: tuple[str, ...] = ()
    """Texts of one token each, the right one first, such as yes no: the reward is the probability
    of the first among them as the judge's reply, which is read from /v1/score of its server and
    not said; none has the judge say a score."""

    @property
    def uses_task(self) -> bool:
        """Whether the task's own reward is among them, which needs the task's answers."""
        return not self.reward or "task" in self.reward

    @property
    def measures_accuracy(self) -> bool:
        """Whether the mean reward is a share of right answers, not a score of anyone's scale."""
        return all(name in ("task", "code") for name in self.reward)


@dataclass(frozen=True, kw_only=True)
class RewardOptions(GraderOptions):
    """What grades the replies, and how much of it may fail."""

    max_failed_share: float = 0.25
    """Share of the replies of five steps that may be without a grade; above it the run ends."""


def check_reward_options(options: GraderOptions) -> None:
    """Raises InvalidRequest (`reward`) for what is no reward, or a file that is not there, and
    (`judge_labels`) for labels that a judge cannot choose among."""
    for name in options.reward:
        _check(name)
    labels = options.judge_labels
    if labels and (len(set(labels)) != len(labels) or len(labels) < 2 or "" in labels):
        raise InvalidRequest(
            f"judge_labels: {' '.join(map(repr, labels))} are not two labels or more, each once; "
            "give the right one first, such as yes no",
            field="judge_labels",
        )


def is_model_reward(name: str) -> bool:
    """Whether a name of `--reward` is that of a reward model."""
    return name.startswith((MODEL, CLASSIFY))


def _check(name: str) -> None:
    url = name.removeprefix("judge:").removeprefix(CLASSIFY)
    if name.startswith(MODEL):
        if not Path(name.removeprefix(MODEL)).exists():
            raise InvalidRequest(f"reward: there is no model at {name!r}", field="reward")
        return
    if name.startswith(("judge:", CLASSIFY, "http:", "https:")):
        _check_url(url)
        return
    place, _, function = name.rpartition(":")
    if name in ("task", "code") or (place and function.isidentifier() and _may_be_module(place)):
        return
    if place.endswith(".py") and function.isidentifier():
        if Path(place).is_file():
            return
        raise InvalidRequest(f"reward: there is no file {place}", field="reward")
    raise InvalidRequest(
        f"reward: {name!r} is none of FILE.py:function, module:function, http://host:port/path, "
        "judge:URL, model:FOLDER, classify:URL, code and task",
        field="reward",
    )


def _may_be_module(place: str) -> bool:
    return not place.endswith(".py") and all(part.isidentifier() for part in place.split("."))


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    if not named:
        raise InvalidRequest(
            f"reward: {url!r} is no address; write http://host:port/path", field="reward"
        )
