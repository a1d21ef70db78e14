"""What every recipe does around its loop: read the options, open the run, tell how it ended."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from recipes.run.dashboard import dashboard_beside
from recipes.run.display import Display
from recipes.run.failures import report_failure
from recipes.run.ledger import Ledger
from recipes.run.opening import open_run
from recipes.run.run import Run
from recipes.run.run_folder import RunFolder
from recipes.settings.command_line import parse
from recipes.settings.options import RunOptions
from recipes.world import launched_rank


class Runs(AbstractContextManager[Any], Protocol):
    """What a command needs of a run, supervised or not."""

    folder: RunFolder
    display: Display

    @property
    def dashboard(self) -> str:
        """The option of that name; "off" in processes that are not the main one."""
        ...

    def begin(self) -> None:
        """Continue, or measure the model before it learns."""
        ...

    def finish(self) -> dict[str, object]:
        """Measure, save, and give the summary."""
        ...


R = TypeVar("R", bound=Runs)


def run_command(
    opened: Callable[[Ledger], R],
    train: Callable[[R], None],
    told: Callable[[R, dict[str, object]], str],
) -> int:
    """Run a command to its end. Returns the exit code: not 0 after an error, which is explained in
    a line.

    opened: reads the options and loads what they name. train: the loop. told: the last line, of
    the run and its summary.
    """
    ledger, folder = Ledger(), None
    level = logging.WARNING if launched_rank() else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    # A line a request, of services that grade, would push the steps off the screen.
    logging.getLogger("httpx").setLevel(max(level, logging.WARNING))
    try:
        with opened(ledger) as run:
            folder = run.folder
            with dashboard_beside(run.dashboard, folder.path, run.display.pin):
                run.begin()
                train(run)
                summary = run.finish()
    except (Exception, KeyboardInterrupt) as error:
        code = report_failure(error, folder)
        if code is None:
            raise
        return code
    logging.getLogger(__name__).info("%s; see %s", told(run, summary), folder.path)
    return 0


def run_recipe(
    train: Callable[[Run], None], defaults: RunOptions, argv: Sequence[str] | None
) -> int:
    """`run_command` of a recipe with rollouts.

    train: its loop. defaults: its options where no flag says otherwise. argv: flags; None takes
    those of the process.
    """
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda ledger: open_run(parse(words, defaults), ledger), train, _told)


def _told(run: Run, summary: dict[str, object]) -> str:
    measured = "accuracy" if run.grading.measures_accuracy else "reward"
    figures = (summary[key] for key in ("eval_before", "eval_after", "steps", "seconds"))
    return "held-out {} {:.3f} -> {:.3f} in {} steps, {:.0f} s".format(measured, *figures)
