"""The value head of a critic: one linear layer on the last hidden state of a network.

It stands outside the transformers model, so that what is published, saved and sharded is the model
alone. Every process has the whole of it.

Legend: P nodes of a tree that predict, H hidden size, K response tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from recipes.algorithms.values import value_loss
from recipes.trainers.metrics import TokenMetrics
from recipes.trainers.microbatch import value_inputs
from recipes.trainers.optimizer_options import OptimizerOptions
from recipes.types import Batch
from recipes.world import World

TENSORS = "value_head.pt"


class ValueHead:
    """A float32 `Linear(H, 1)` with an AdamW of its own.

    options: of the optimizer; the head has no weight decay. coef: weight of the value loss.
    clip: its range. lr_ratio: the head's learning rate over that of the network it stands on.
    weight: [1, H] that it starts from; None is zero, as its bias is.
    """

    def __init__(
        self,
        hidden_size: int,
        options: OptimizerOptions,
        *,
        device: torch.device,
        coef: float,
        clip: float,
        lr_ratio: float = 1.0,
        weight: torch.Tensor | None = None,
        world: World | None = None,
    ) -> None:
        self.linear = torch.nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
        for parameter in self.linear.parameters():
            torch.nn.init.zeros_(parameter)
        if weight is not None:
            with torch.no_grad():
                self.linear.weight.copy_(weight)
        self._gradient = [torch.zeros_like(p.detach()) for p in self.linear.parameters()]
        self._coef, self._clip, self._lr_ratio = coef, clip, lr_ratio
        self._max_grad_norm = options.max_grad_norm
        self._num_processes = (world or World()).size
        self._optimizer = torch.optim.AdamW(
            self.linear.parameters(),
            lr=options.lr * lr_ratio,
            betas=(options.beta1, options.beta2),
            weight_decay=0.0,
        )

    def __call__(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        """The value at each node, float32 [P], of its last hidden state in any dtype."""
        values_P: torch.Tensor = self.linear(hidden_PH.float())[:, 0]
        return values_P

    def loss(self, part: Batch, values_K: torch.Tensor, metrics: TokenMetrics) -> torch.Tensor:
        """The weighted value loss of a micro-batch that has `values` and `returns`; scalar with
        gradient. metrics: takes in its figures.

        The head's own gradient is taken here, and kept until `step`: what a backward pass from the
        loss adds to it, which a back end may have scaled, does not count.
        """
        output = value_loss(value_inputs(part, values_K), self._clip)
        metrics.add_values(output)
        loss = self._coef * output.loss
        if values_K.requires_grad:
            taken = torch.autograd.grad(loss, list(self.linear.parameters()), retain_graph=True)
            for gradient, more in zip(self._gradient, taken, strict=True):
                gradient += more
        return loss

    def step(self, lr: float) -> float:
        """One clipped update; returns the norm of the gradient before clipping. Collective.

        lr: of the network. The losses of all processes have the weights of the whole batch, so its
        gradient is the sum of theirs.
        """
        for parameter, gradient in zip(self.linear.parameters(), self._gradient, strict=True):
            if self._num_processes > 1:
                dist.all_reduce(gradient)
            parameter.grad = gradient.clone()
            gradient.zero_()
        norm = torch.nn.utils.clip_grad_norm_(self.linear.parameters(), self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * self._lr_ratio
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def save(self, folder: Path) -> None:
        """Write head and optimizer into an existing folder: in one process."""
        state = {"head": self.linear.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / TENSORS)

    def load(self, folder: Path) -> None:
        """Inverse of `save`: in every process."""
        state = torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
        self.linear.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
