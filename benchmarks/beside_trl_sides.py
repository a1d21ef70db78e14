"""The sides of `benchmarks/beside_trl.py`: each trains one seed and says what came of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.protocol import SamplingParams
from recipes.actors.actor import Actor
from recipes.actors.launch import launch_actor
from recipes.algorithms.presets import AlgorithmOptions
from recipes.collecting.collect import rollout, score
from recipes.collecting.prompts import Prompts
from recipes.environments.base import Environment, heldout_problems, problem_at
from recipes.environments.named_tasks import select_environment
from recipes.grpo import train
from recipes.run.ledger import Ledger
from recipes.run.opening import open_run
from recipes.settings.options import RolloutOptions, RunOptions
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.types import Problem
from rollout.launch import read_checkpoint
from rollout.offline import Tokenizer, load_tokenizer
from trainer_bridge import load_causal_lm

Result = dict[str, Any]
"""accuracy: held-out, by step; seconds: of training, evaluations left out; reward: by step."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both sides train. rows: sequences that TRL's trainer computes at once."""

    model: str
    task: str
    dtype: str
    steps: int
    eval_every: int
    eval_prompts: int
    prompts: int
    samples: int
    lr: float
    temperature: float
    rows: int
    seed: int

    def options(self, folder: Path) -> RunOptions:
        """Plain GRPO, as TRL's loss "grpo" with its rewards scaled by group."""
        return RunOptions(
            task=self.task,
            model=self.model,
            dtype=self.dtype,  # type: ignore[arg-type]
            device="cpu",
            seed=self.seed,
            steps=self.steps,
            out=str(folder),
            eval_every=self.eval_every,
            eval_prompts=self.eval_prompts,
            checkpoint_every=0,
            rollout=RolloutOptions(
                prompts_per_step=self.prompts, samples=self.samples, temperature=self.temperature
            ),
            optimizer=OptimizerOptions(lr=self.lr),
            objective=AlgorithmOptions(algorithm="grpo"),
        )


def ours(work: Work) -> Result:
    """The recipe, its engine and its trainer."""
    with tempfile.TemporaryDirectory() as folder:
        with open_run(work.options(Path(folder) / "run"), Ledger()) as run:
            run.begin()
            train(run)
            rows = run.folder.read_metrics()
        accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
        return {
            "accuracy": {
                "0": run.progress.eval_before,
                **{str(int(s)): a for s, a in accuracy.items()},
            },
            "seconds": sum(row["timing_s/step"] for row in rows),
            "reward": [row["reward"] for row in rows],
        }


def trl(work: Work) -> Result:
    """TRL's GRPOTrainer with transformers' generation, as it is; the held-out problems are answered
    by our engine, with the trainer's weights."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        judge = Judge.open(work, Path(folder))
        load_tokenizer(work.model).write_hf(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        checkpoint = read_checkpoint(work.model)
        model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors)
        model.to(dtype=torch.float32)
        model.generation_config.eos_token_id = judge.prompts.stop_ids
        problems = [
            problem_at(judge.environment, "train", work.seed, index)
            for index in range(work.steps * work.prompts)
        ]
        asked = [prompt_of(judge.prompts, tokenizer, problem) for problem in problems]
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=judge.reward(problems),
            args=trl_config(work, judge.environment.max_new_tokens, folder),
            train_dataset=Dataset.from_dict({"prompt": asked, "index": list(range(len(problems)))}),
            processing_class=tokenizer,
            callbacks=[judge.callback()],
        )
        judge.measure(model, 0)
        with judge.clock.running():
            trainer.train()
        judge.actor.close()
        history = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        return {"accuracy": judge.accuracy, "seconds": judge.clock.seconds, "reward": history}


def trl_config(work: Work, max_new_tokens: int, folder: str) -> Any:
    """The same numbers in TRL's words; what is not named here is TRL's default."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=work.dtype == "bfloat16",
        seed=work.seed,
        max_steps=work.steps,
        per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=work.prompts * work.samples // work.rows,
        num_generations=work.samples,
        max_completion_length=max_new_tokens,
        temperature=work.temperature,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        num_iterations=1,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def prompt_of(prompts: Prompts, tokenizer: Any, problem: Problem) -> Any:
    """A problem as TRL takes it: a chat, or a text. Raises ValueError if its ids would be
    others than ours."""
    ours_ids = prompts.prompt_ids(problem).tolist()
    if prompts.is_chat:
        chat: Any = prompts.environment.messages(problem)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    else:
        chat = prompts.tokenizer.decode(np.asarray(ours_ids))
        ids = tokenizer(chat)["input_ids"]
    if list(ids) != ours_ids:
        raise ValueError(f"{problem.question!r} has other tokens in transformers' tokenizer")
    return chat


@dataclass
class Clock:
    """Seconds, those in `stopped` left out."""

    seconds: float = 0.0
    _since: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts what is inside."""
        self._since = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - self._since

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Does not count what is inside; within `running`."""
        self.seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()


@dataclass
class Judge:
    """Rewards and held-out accuracy of another trainer's model, as ours are measured."""

    environment: Environment
    prompts: Prompts
    actor: Actor
    heldout: list[Problem]
    eval_every: int
    clock: Clock = field(default_factory=Clock)
    accuracy: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, work: Work, folder: Path) -> Judge:
        """With an engine for the evaluations."""
        environment = select_environment(work.task)
        actor = launch_actor(work.options(folder))
        tokenizer: Tokenizer = load_tokenizer(work.model)
        return cls(
            environment=environment,
            prompts=Prompts(environment, tokenizer, actor.state().eos_ids),
            actor=actor,
            heldout=heldout_problems(environment, work.eval_prompts),
            eval_every=work.eval_every,
        )

    def reward(self, problems: list[Problem]) -> Callable[..., list[float]]:
        """The task's own, of what TRL's trainer has sampled."""

        def verify(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
            texts = [self.prompts.reply_text(np.asarray(ids, np.int32)) for ids in completion_ids]
            asked = [problems[each] for each in index]
            return [self.environment.verify(*pair) for pair in zip(texts, asked, strict=True)]

        return verify

    def callback(self) -> Any:
        """Measures the trainer's model where that is due."""
        from transformers import TrainerCallback

        judge = self

        class Evaluation(TrainerCallback):  # type: ignore[misc, unused-ignore]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step % judge.eval_every == 0:
                    with judge.clock.stopped():
                        judge.measure(kwargs["model"], state.global_step)

        return Evaluation()

    def measure(self, model: Any, step: int) -> None:
        """Held-out accuracy of these weights."""
        self.actor.push(model, version=step + 1, measure_memcpy=False)
        longest = self.environment.max_new_tokens
        greedy = SamplingParams(max_new_tokens=longest, temperature=0.0)
        replies = rollout(self.actor, self.prompts, self.heldout, greedy, samples=1, seed=0)
        self.actor.flush()
        groups = score(self.prompts, self.heldout, replies)
        right = sum(group.trajectories[0].correct for group in groups)
        self.accuracy[str(step)] = right / len(groups)
