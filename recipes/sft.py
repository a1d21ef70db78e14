"""Supervised fine-tuning: a language model learns to say what the assistant says in conversations.

    python recipes/sft.py --help
    torchrun --nproc-per-node 4 recipes/sft.py --trainer fsdp --task chats.parquet

Each step, the cross-entropy of the assistant's tokens is averaged over a batch of conversations,
which share the computation of equal beginnings, and the optimizer takes one step. At evaluations
the engine takes the weights in place and answers held-out problems. The model that is saved is
what `--model` of `grpo.py` starts from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.algorithms.supervised import sft_loss
from recipes.run.command import run_command
from recipes.settings.command_line import parse_sft
from recipes.trainers.loss_scale import scale_figures
from recipes.trainers.metrics import TokenMetrics, merge
from recipes.tuning.sft_opening import open_sft
from recipes.tuning.sft_run import SftRun
from recipes.types import Batch
from recipes.world import leave


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
        **metrics.routing_figures(),
        **scale_figures(run.trainer.loss_scale),
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "perf/learnt_tokens": float(sum(kept.sum() for kept in batch.kept)),
        "perf/trainer_computed_tokens": float(metrics.computed_tokens),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe. Returns the exit code: not 0 after an error, which is explained in a line."""
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda ledger: open_sft(parse_sft(words), ledger), train, _told)


def _told(run: SftRun, summary: dict[str, object]) -> str:
    keys = ("eval_loss_before", "eval_loss_after", "steps", "seconds")
    figures = (summary[key] for key in keys)
    return "held-out loss {:.4f} -> {:.4f} in {} steps, {:.0f} s".format(*figures)


if __name__ == "__main__":
    # Spawned engines inherit the path, where `types` of this folder would hide Python's own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    leave(main())
