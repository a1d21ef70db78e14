"""A supervised run: its parts, its beginning or resumption, and what follows each step."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Self

from recipes.actors.actor import Actor
from recipes.run.display import Display
from recipes.run.ledger import Ledger
from recipes.run.run_folder import RunFolder
from recipes.run.saving import num_elements, save_folder
from recipes.run.tracking import Tracker
from recipes.settings.sft_options import SftOptions
from recipes.trainers.base import Learner
from recipes.trainers.checkpoint import (
    checkpoint_bytes,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from recipes.trainers.model import engine_dtype
from recipes.trainers.schedule import learning_rate
from recipes.tuning.example_stream import make_batch
from recipes.tuning.heldout_measure import Asked, heldout_loss
from recipes.tuning.sft_progress import SftProgress
from recipes.tuning.sft_task import SftTask
from recipes.types import Batch
from recipes.world import World
from rollout.offline import Tokenizer, replace_file


@dataclass(kw_only=True)
class SftRun:
    """Everything the loop works with; see `open_sft`. Used as a context manager around the loop,
    it shows the display, and frees the engine and leaves the other processes at the end."""

    options: SftOptions
    task: SftTask
    asked: Asked | None
    tokenizer: Tokenizer
    actor: Actor
    trainer: Learner
    world: World
    folder: RunFolder
    ledger: Ledger
    display: Display
    tracker: Tracker
    progress: SftProgress = field(default_factory=SftProgress)

    def __enter__(self) -> Self:
        self.display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.__exit__()
        if self.asked is not None:
            self.asked.grading.close()
        self.actor.close()
        self.world.close()
        self.folder.close()

    @property
    def dashboard(self) -> str:
        """See `command.Runs`."""
        return self.options.dashboard if self.world.is_main else "off"

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; the last one may have fewer examples."""
        return -(-self.task.num // self.options.batch_size)

    def goes_on(self) -> bool:
        """Whether another step is to be taken; the same in all processes."""
        in_time = True
        if self.options.minutes is not None:
            spent = self.world.from_main(self.progress.total_seconds)
            in_time = spent < 60 * self.options.minutes
        return self.progress.position < self.task.num and in_time

    def next_batch(self) -> Batch:
        """The examples of the next step, the same in all processes."""
        first = self.progress.position
        end = min(first + self.options.batch_size, self.task.num)
        self.progress.position = end
        return make_batch([self.task.examples.at(position) for position in range(first, end)])

    def learning_rate(self) -> float:
        """The rate of the current step."""
        optimizer = self.options.optimizer
        return learning_rate(
            self.progress.step,
            peak=optimizer.lr,
            schedule=optimizer.schedule,
            warmup_steps=optimizer.warmup_steps,
            total_steps=self.total_steps,
        )

    def begin(self) -> None:
        """Continue from the last checkpoint, or measure the model before it learns."""
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        if checkpoint is not None:
            progress, _ = load_checkpoint(checkpoint, self.trainer.load)
            self.progress = SftProgress(**progress)
            self.display.note(f"continuing after step {self.progress.step}")
        self.folder.truncate(self.progress.step)
        self._spend("startup")
        if not self.progress.before:
            self._evaluate()

    def finish_step(self, figures: dict[str, float]) -> None:
        """Count the step; report it; evaluate and checkpoint where they are due."""
        seconds = self.ledger.take()
        self.progress.spent(seconds)
        self.progress.step += 1
        step = self.progress.step
        row: dict[str, float] = {
            "step": step,
            **figures,
            "timing_s/train": seconds.get("train", 0.0),
            "timing_s/step": sum(seconds.values()),
        }
        if _due(step, self.options.eval_every):
            row["timing_s/eval"] = self._evaluate()
            row |= self.progress.now
        self.folder.append_metrics(row)
        self.tracker.log(row)
        self.display.show(row)
        if _due(step, self.options.checkpoint_every):
            self._checkpoint()

    def finish(self) -> dict[str, object]:
        """Measure, save the model and write the summary, which is returned."""
        if self.progress.measured_at != self.progress.step:
            self._evaluate()
        self.display.note("saving the model")
        dtype = engine_dtype(self.actor)
        save_folder(
            self.folder.model,
            self.world,
            save=lambda folder: self.trainer.write_model(folder, dtype),
            complete=self.tokenizer.write_hf,
            num_bytes=dtype.itemsize * num_elements(self.trainer.weights),
        )
        if self.world.is_main:
            self._draw_curve()
        self._spend("save")
        summary = self._summary(str(dtype).removeprefix("torch."))
        self.folder.write_summary(summary)
        self.tracker.close(summary)
        # A process that fails on its way out must not end one that is still writing.
        self.world.barrier()
        return summary

    def _summary(self, dtype: str) -> dict[str, object]:
        progress = self.progress
        return {
            "task": self.task.name,
            "seed": self.options.seed,
            "steps": progress.step,
            "examples": progress.position,
            "seconds": progress.total_seconds,
            "eval_loss_before": progress.before["eval/loss"],
            "eval_loss_after": progress.now["eval/loss"],
            "eval_before": progress.before.get("eval/accuracy"),
            "eval_after": progress.now.get("eval/accuracy"),
            "model": self.options.model,
            "device": self.actor.state().device,
            "dtype": dtype,
            "trainer": self.options.placement.trainer,
            "trainer_processes": self.world.size,
            "eval_prompts": len(self.task.heldout),
            "seconds_by_phase": progress.seconds,
        }

    def _evaluate(self) -> float:
        self.display.note(f"evaluating {len(self.task.heldout)} held-out conversations")
        with self.ledger.phase("eval"):
            figures = {"eval/loss": heldout_loss(self.trainer, self.task.heldout)}
            if self.asked is not None:
                step = self.progress.step
                figures["eval/accuracy"] = self.asked.accuracy(self.trainer, step)
        self.progress.measured(figures)
        told = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.display.note(f"held out, after step {self.progress.step}: {told}")
        return self._spend("eval")

    def _checkpoint(self) -> None:
        save_checkpoint(
            self.folder.checkpoints,
            self.progress.step,
            self.trainer.save,
            self.progress.as_dict(),
            self.world,
            num_bytes=checkpoint_bytes(self.trainer.weights),
        )
        self._spend("checkpoint")

    def _spend(self, phase: str) -> float:
        """Book all time since the last reading under one phase; returns it."""
        seconds = sum(self.ledger.take().values())
        self.progress.spent({phase: seconds})
        return seconds

    def _draw_curve(self) -> None:
        """Write loss.png from the metrics so far."""
        from matplotlib.figure import Figure

        rows = self.folder.read_metrics()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="loss")
        measured = [{"step": 0, **self.progress.before}, *(r for r in rows if "eval/loss" in r)]
        heldout = [row["eval/loss"] for row in measured]
        axes.plot([row["step"] for row in measured], heldout, marker="o", label="held-out loss")
        axes.set(xlabel="step", ylabel="nats per token", title=f"{self.task.name}, SFT")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format="png")
        replace_file(self.folder.path / "loss.png", picture.getvalue())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
