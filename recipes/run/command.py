"""What every recipe does around its loop: read the options, open the run, tell how it ended."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from recipes.run.failures import report_failure
from recipes.run.ledger import Ledger
from recipes.run.opening import open_run
from recipes.run.run import Run
from recipes.settings.command_line import parse
from recipes.settings.options import RunOptions
from recipes.world import launched_rank


def run_recipe(
    train: Callable[[Run], None], defaults: RunOptions, argv: Sequence[str] | None
) -> int:
    """Run a recipe. Returns the exit code: not 0 after an error, which is explained in a line.

    train: its loop. defaults: its options where no flag says otherwise. argv: flags; None takes
    those of the process.
    """
    ledger, folder = Ledger(), None
    level = logging.WARNING if launched_rank() else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    # A line a request, of services that grade, would push the steps off the screen.
    logging.getLogger("httpx").setLevel(max(level, logging.WARNING))
    try:
        options = parse(sys.argv[1:] if argv is None else argv, defaults)
        with open_run(options, ledger) as run:
            folder = run.folder
            run.begin()
            train(run)
            summary = run.finish()
    except (Exception, KeyboardInterrupt) as error:
        code = report_failure(error, folder)
        if code is None:
            raise
        return code
    logging.getLogger(__name__).info(
        "held-out %s %.3f -> %.3f in %d steps, %.0f s; see %s",
        "accuracy" if run.grading.measures_accuracy else "reward",
        *(summary[key] for key in ("eval_before", "eval_after", "steps", "seconds")),
        folder.path,
    )
    return 0
