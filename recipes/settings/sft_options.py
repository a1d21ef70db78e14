"""Everything a supervised run can be told, as flags (`--help`), as a TOML file, in config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import tyro

from engine.config import Device, DType, LoadFormat
from recipes.data.data_options import SftDataOptions
from recipes.settings.options import (
    DEFAULT_MODEL,
    PlacementOptions,
    RolloutOptions,
    RunOptions,
    WandbMode,
)
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.routing_options import RouterOptions, RoutingOptions


@dataclass(frozen=True, kw_only=True)
class SftOptions:
    """Fine-tune a language model on conversations: the loss is on the assistant's tokens alone.

    The Slipstream engine answers held-out problems with the weights as they are.
    """

    task: str = "largest"
    """A path to conversations or to prompts and completions (jsonl, csv, parquet, arrow, or a
    folder of them), or a built-in task or gym:<name>, whose answers are learnt."""
    eval_task: str | None = None
    """Task whose held-out problems the model answers at evaluations, as --task of grpo.py; None
    takes --task where that is no path."""
    skip_long_prompts: bool = False
    """Leave out the rows of a file that do not fit into the model's context, instead of refusing
    the run."""
    batch_size: int = 32
    """Conversations of one optimizer step."""
    epochs: float | None = None
    """Times that the rows of a file are gone through; None, without --steps, is once."""
    steps: int | None = None
    """Optimizer steps, in place of --epochs; a task that is no file takes 50 without either."""
    minutes: float | None = None
    """Stop before the first step that begins after so many minutes; None never does."""
    seed: int = 0
    """Seed of the order of the rows."""
    out: str | None = None
    """Run folder; None makes runs/<time>-<task>."""
    model: str = str(DEFAULT_MODEL)
    """Hugging Face folder, GGUF file, or a config.json (with --load-format random)."""
    load_format: LoadFormat = "auto"
    """Where the weights come from; 'random' needs only a config.json."""
    device: Device = "auto"
    """'auto' takes a GPU when torch sees one."""
    dtype: DType = "auto"
    """What the trainer computes in and the engine serves; the masters are float32, and in float16
    the loss is scaled. 'auto' never takes float16."""
    resume: str | None = None
    """Run folder to continue from its last complete checkpoint."""
    wandb: WandbMode = "off"
    """Also log to Weights & Biases: to local files, or to the service."""
    eval_every: int = 20
    """Steps between held-out evaluations; 0 evaluates only before and after."""
    eval_prompts: int = 256
    """Held-out conversations, and held-out problems, of an evaluation."""
    max_new_tokens: int | None = None
    """Longest reply to a held-out problem; None takes the task's own."""
    kv_memory_gb: float = 1.0
    """Memory of the engine's KV cache, GiB."""
    checkpoint_every: int = 20
    """Steps between checkpoints; 0 writes none."""
    dashboard: str = "auto"
    """Show the run in a browser while it goes on, at 127.0.0.1: a port, 'on' for a free one, 'off',
    or 'auto', which is on in a terminal."""
    config: str | None = None
    """TOML file with defaults for these options, named as here with _ for -."""
    data: tyro.conf.OmitArgPrefixes[SftDataOptions] = field(default_factory=SftDataOptions)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = field(
        default_factory=lambda: OptimizerOptions(lr=2e-5, schedule="linear", warmup_steps=5)
    )
    placement: tyro.conf.OmitArgPrefixes[PlacementOptions] = field(default_factory=PlacementOptions)
    routing: tyro.conf.OmitArgPrefixes[RouterOptions] = field(default_factory=RouterOptions)


def run_options(options: SftOptions) -> RunOptions:
    """The same engine, trainer and folder as options of a run with rollouts."""
    return RunOptions(
        task=options.task,
        seed=options.seed,
        out=options.out,
        model=options.model,
        load_format=options.load_format,
        device=options.device,
        dtype=options.dtype,
        resume=options.resume,
        wandb=options.wandb,
        rollout=RolloutOptions(
            max_new_tokens=options.max_new_tokens, kv_memory_gb=options.kv_memory_gb
        ),
        optimizer=options.optimizer,
        placement=options.placement,
        routing=RoutingOptions(**dataclasses.asdict(options.routing)),
    )
