"""Everything a run can be told, as flags (`--help`), as a TOML file, and in config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from engine.config import Device, DType, LoadFormat
from recipes.actors.endpoint_options import EndpointOptions
from recipes.actors.teacher_options import TeacherOptions
from recipes.algorithms.presets import AlgorithmOptions
from recipes.asynchrony.async_options import AsyncOptions
from recipes.data.data_options import DataOptions
from recipes.evaluation.evaluation_options import EvaluationOptions
from recipes.rewards.programs.code_options import CodeOptions
from recipes.rewards.reward_models.reward_model_options import RewardModelOptions
from recipes.rewards.reward_options import RewardOptions
from recipes.trainers.critic_options import CriticOptions
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.trainers.routing_options import RoutingOptions

DEFAULT_MODEL = Path(__file__).parent.parent.parent / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

WandbMode = Literal["off", "offline", "online"]
TrainerName = Literal["plain", "deepspeed", "fsdp"]
ZeroStage = Literal[0, 1, 2, 3]
Drafter = Literal["off", "auto", "ngram"]
RolloutQuantization = Literal["none", "int8"]


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How replies are sampled."""

    prompts_per_step: int = 8
    """Problems sampled each step: groups of the batch."""
    samples: int = 8
    """Replies to each problem."""
    temperature: float = 1.0
    """Sampling temperature of training rollouts; evaluation is greedy."""
    max_new_tokens: int | None = None
    """Longest reply in tokens; None takes the task's own."""
    kv_memory_gb: float = 1.0
    """Memory of the engine's KV cache, GiB."""
    speculative: Drafter = "off"
    """Draft tokens ahead and verify them together, which changes when they come and not what they
    are: 'ngram' copies them from replies so far, 'auto' as many as are being accepted."""
    draft_tokens: int = 3
    """Most tokens drafted at once for a reply, 1 to 7."""
    rollout_quantization: RolloutQuantization = "none"
    """What the engine that samples stores linear weights as: 'int8' quantises every update as it
    is placed. The trainer computes in its own dtype, so correct for the difference (--is-level)."""


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """Which trainer learns, and where it and the engines are."""

    trainer: TrainerName = "plain"
    """plain (one process), deepspeed or fsdp; with several processes, start by torchrun."""
    zero: ZeroStage | None = None
    """ZeRO stage of the DeepSpeed trainer; None takes 2."""
    rollout_gpus: int = 0
    """Give the last GPUs to engines of their own; 0 has every trainer process roll out too."""
    sleep: bool | None = None
    """Release the engine's memory while training; None does so on a GPU with
    torch-memory-saver, where they share it."""
    trainer_memory_gb: float = 0.0
    """GPU memory of one trainer process at the peak of its step, GiB, where it shares a GPU with
    an engine: the run is refused, with numbers, if a phase does not fit. 0 plans nothing."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Train a language model by GRPO, or one of its relatives, on a task with verifiable rewards.

    Rollouts come from the Slipstream engine, which takes the new weights in place each step.
    """

    task: str = "largest"
    """largest, sorting, addition, letter_count, expression, a path to prompts and answers (jsonl,
    csv, parquet, arrow, or a folder of them), or gym:<name> for a reasoning-gym task."""
    skip_long_prompts: bool = False
    """Leave out the prompts of a file that do not fit into the model's context, instead of
    refusing the run."""
    seed: int = 0
    """Seed of the problems and of the sampling."""
    steps: int = 80
    """Optimizer steps of the run."""
    minutes: float | None = None
    """Stop before the first step that begins after so many minutes; None never does."""
    out: str | None = None
    """Run folder; None makes runs/<time>-<task>."""
    model: str = str(DEFAULT_MODEL)
    """Hugging Face folder, GGUF file, or a config.json (with --load-format random)."""
    load_format: LoadFormat = "auto"
    """Where the weights come from; 'random' needs only a config.json."""
    device: Device = "auto"
    """'auto' takes a GPU when torch sees one."""
    dtype: DType = "auto"
    """What the engine serves and the trainer computes in; the trainer's masters are float32, and in
    float16 its loss is scaled. 'auto' never takes float16."""
    resume: str | None = None
    """Run folder to continue from its last complete checkpoint."""
    wandb: WandbMode = "off"
    """Also log to Weights & Biases: to local files, or to the service."""
    eval_every: int = 20
    """Steps between held-out evaluations; 0 evaluates only before and after."""
    eval_prompts: int = 256
    """Held-out problems of an evaluation."""
    checkpoint_every: int = 20
    """Steps between checkpoints; 0 writes none."""
    keep_rollouts: int = 4
    """Groups of replies a step that rollouts.jsonl keeps token by token."""
    keep_entropy: bool = False
    """Have the engine compute the entropy behind every token, which rollouts.jsonl then has too."""
    dashboard: str = "auto"
    """Show the run in a browser while it goes on, at 127.0.0.1: a port, 'on' for a free one, 'off',
    or 'auto', which is on in a terminal."""
    config: str | None = None
    """TOML file with defaults for these options, named as here with _ for -."""
    data: tyro.conf.OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)
    rollout: tyro.conf.OmitArgPrefixes[RolloutOptions] = field(default_factory=RolloutOptions)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = field(default_factory=OptimizerOptions)
    rewards: tyro.conf.OmitArgPrefixes[RewardOptions] = field(default_factory=RewardOptions)
    code: tyro.conf.OmitArgPrefixes[CodeOptions] = field(default_factory=CodeOptions)
    reward_model: tyro.conf.OmitArgPrefixes[RewardModelOptions] = field(
        default_factory=RewardModelOptions
    )
    placement: tyro.conf.OmitArgPrefixes[PlacementOptions] = field(default_factory=PlacementOptions)
    endpoints: tyro.conf.OmitArgPrefixes[EndpointOptions] = field(default_factory=EndpointOptions)
    objective: tyro.conf.OmitArgPrefixes[AlgorithmOptions] = field(default_factory=AlgorithmOptions)
    evaluation: tyro.conf.OmitArgPrefixes[EvaluationOptions] = field(
        default_factory=EvaluationOptions
    )
    distillation: tyro.conf.OmitArgPrefixes[TeacherOptions] = field(default_factory=TeacherOptions)
    routing: tyro.conf.OmitArgPrefixes[RoutingOptions] = field(default_factory=RoutingOptions)
    asynchrony: tyro.conf.OmitArgPrefixes[AsyncOptions] = field(default_factory=AsyncOptions)


@dataclass(frozen=True, kw_only=True)
class PpoOptions(RunOptions):
    """Train a language model by PPO, with a critic, on a task with verifiable rewards.

    Rollouts come from the Slipstream engine, which takes the new weights in place each step.
    """

    steps: int = 60
    """Optimizer steps of the run."""
    keep_rollouts: int = 16
    """Groups of replies a step that rollouts.jsonl keeps token by token."""
    rollout: tyro.conf.OmitArgPrefixes[RolloutOptions] = field(
        default_factory=lambda: RolloutOptions(prompts_per_step=64, samples=1)
    )
    objective: tyro.conf.OmitArgPrefixes[AlgorithmOptions] = field(
        default_factory=lambda: AlgorithmOptions(algorithm="ppo", num_minibatches=2)
    )
    value_function: tyro.conf.OmitArgPrefixes[CriticOptions] = field(default_factory=CriticOptions)


def groups_of(options: Any) -> list[str]:
    """Fields of options that are groups of options."""
    names = [f.name for f in dataclasses.fields(options)]
    return [name for name in names if dataclasses.is_dataclass(getattr(options, name))]


def flatten(options: Any) -> dict[str, Any]:
    """Every option by its name, groups dissolved; names are unique over the groups."""
    flat = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    for group in groups_of(options):
        flat.update(dataclasses.asdict(flat.pop(group)))
    return flat
