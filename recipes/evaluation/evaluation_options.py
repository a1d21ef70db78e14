"""Which sets a run is measured on, beside the held-out problems of its task, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction
from tyro.constructors import PrimitiveConstructorSpec

from engine.errors import InvalidRequest

MAIN_SET = "heldout"
"""Name of the set of the task's own held-out problems."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def _read_numbers(words: list[str]) -> tuple[int, ...]:
    return tuple(int(word) for word in words[0].split(",") if word.strip())


_NUMBERS = PrimitiveConstructorSpec(
    nargs=1,
    metavar="K,K,...",
    instance_from_str=_read_numbers,
    is_instance=lambda value: isinstance(value, tuple),
    str_from_instance=lambda value: [",".join(str(number) for number in value)],
)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is measured at every evaluation, beside the greedy accuracy."""

    eval_set: UseAppendAction[tuple[str, ...]] = ()
    """NAME=TASK: a further set of problems, of whatever --task takes. All problems of a file, the
    split test of a folder with several, the held-out ones of a generated task and of the file that
    is trained on."""
    eval_samples: int = 0
    """Replies sampled to each problem, for pass@k and avg@k; 0 takes greedy replies alone."""
    eval_temperature: float = 1.0
    """Sampling temperature of those replies."""
    eval_k: Annotated[tuple[int, ...], _NUMBERS] = ()
    """The k of pass@k; by default 1 and --eval-samples."""

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k, in order; none without samples."""
        if not self.eval_samples:
            return ()
        return tuple(sorted(set(self.eval_k or (1, self.eval_samples))))


def check_evaluation(options: EvaluationOptions) -> None:
    """Raises InvalidRequest naming `eval_k` for a k that the samples do not give, and `eval_set`
    for a set without a name of its own."""
    for k in options.eval_k:
        if k < 1:
            raise InvalidRequest(f"eval_k must be at least 1, not {k}", field="eval_k")
        if k > options.eval_samples:
            raise InvalidRequest(
                f"eval_k: pass@{k} needs {k} replies to a problem, and --eval-samples is "
                f"{options.eval_samples}; raise it, or leave {k} out",
                field="eval_k",
            )
    named_tasks(options.eval_set)


def named_tasks(words: tuple[str, ...]) -> dict[str, str]:
    """The task of each set by its name, from words NAME=TASK. Raises InvalidRequest (`eval_set`)
    for a word that is none, a name that is taken and one that does not fit into a figure's."""
    tasks: dict[str, str] = {}
    for word in words:
        name, equals, task = word.partition("=")
        if not equals or not task:
            _refuse(f"{word!r} is no set; give NAME=TASK, such as --eval-set sums=addition")
        if not _NAME.fullmatch(name):
            _refuse(
                f"{name!r} is no name of a set; take letters, digits, '.', '_' and '-', and begin "
                "with a letter or digit"
            )
        if name == MAIN_SET:
            _refuse(f"{MAIN_SET} is the set of the task's own held-out problems; name another")
        if name in tasks:
            _refuse(f"two sets are named {name}; give each a name of its own")
        tasks[name] = task
    return tasks


def _refuse(problem: str) -> None:
    raise InvalidRequest(f"eval_set: {problem}", field="eval_set")
