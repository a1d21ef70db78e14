"""What a training run says when it ends by an error."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from recipes.run.run_folder import RunFolder
from recipes.trainers.checkpoint import latest_checkpoint
from rollout.offline import report

ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "OutOfMemory": "lower --kv-memory-gb, --samples or --max-tokens-per-microbatch",
        "QueueFull": "lower --prompts-per-step or --samples",
        "NonFiniteLogits": "the weights have diverged: start again with a lower --lr; or, in "
        "float16, activations overflow: take --dtype bfloat16",
        "NonFiniteGradient": "take --dtype bfloat16, or start again with a lower --lr",
        "NonFiniteWeights": "the weights have diverged: start again with a lower --lr",
        "DiskFull": "make room on the disk",
        "EngineDead": "the engine's last words are above",
    }
)


def report_failure(error: BaseException, folder: RunFolder | None) -> int | None:
    """The exit code, after one line on stderr; None for an error that is not known (raise it).

    folder: of the run, if it got that far.
    """
    return report(error, advice=ADVICE, then=_how_to_go_on(folder))


def _how_to_go_on(folder: RunFolder | None) -> str:
    """How to continue the run; "" where there is nothing to continue from."""
    checkpoint = None if folder is None else latest_checkpoint(folder.checkpoints)
    if folder is None or checkpoint is None:
        return ""
    step = int(checkpoint.name.rpartition("_")[2])
    return f"continue after step {step} with --resume {folder.path}"
