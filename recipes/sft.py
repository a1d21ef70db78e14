"""Supervised fine-tuning: a language model learns to say what the assistant says in conversations.

    python recipes/sft.py --help
    torchrun --nproc-per-node 4 recipes/sft.py --trainer fsdp --task chats.parquet

Each step, the cross-entropy of the assistant's tokens is averaged over a batch of conversations,
which share the computation of equal beginnings, and the optimizer takes one step. At evaluations
the engine takes the weights in place and answers held-out problems. The model that is saved is
what `--model` of `grpo.py` starts from.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.algorithms.supervised import sft_loss
from recipes.run.failures import report_failure
from recipes.run.ledger import Ledger
from recipes.settings.command_line import parse_sft
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.tuning.sft_opening import open_sft
from recipes.tuning.sft_run import SftRun
from recipes.types import Batch
from recipes.world import launched_rank, leave


def train(run: SftRun) -> None:
    """The loop: batch -> loss -> step."""
    while run.goes_on():
        with run.ledger.phase("train"):
            figures = update(run, run.next_batch())
        run.finish_step(figures)


def update(run: SftRun, batch: Batch) -> dict[str, float]:
    """The gradient of the batch's loss, and one optimizer step."""
    metrics, lr = TokenMetrics(), run.learning_rate()
    run.trainer.accumulate(batch, sft_loss, metrics)
    grad_norm = run.trainer.step(lr)
    metrics = merge(run.world.gather([metrics]))
    assert batch.kept is not None
    return {
        "loss": metrics.loss,
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "perf/learnt_tokens": float(sum(kept.sum() for kept in batch.kept)),
        "perf/trainer_computed_tokens": float(metrics.computed_tokens),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe. Returns the exit code: not 0 after an error, which is explained in a line."""
    ledger, folder = Ledger(), None
    level = logging.WARNING if launched_rank() else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    try:
        options = parse_sft(sys.argv[1:] if argv is None else argv)
        with open_sft(options, ledger) as run:
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
        "held-out loss %.4f -> %.4f in %d steps, %.0f s; see %s",
        *(summary[key] for key in ("eval_loss_before", "eval_loss_after", "steps", "seconds")),
        folder.path,
    )
    return 0


if __name__ == "__main__":
    # Spawned engines inherit the path, where `types` of this folder would hide Python's own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    leave(main())
