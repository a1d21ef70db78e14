"""Float32 masters of a model that computes in fewer bits, and where they start.

The forward and backward pass run on parameters in the dtype that the engine serves: norms,
embedding and residual stream included, so that trainer and engine compute the same function. The
optimizer works on float32 masters, which are rounded into those parameters after each step.

Legend of the rounding: a bfloat16 number x stands for every float32 number that rounds to it, its
cell. A learning rate of 1e-5 moves a master by far less than a cell, so masters that all start at
the centre of their cells show nothing of the first steps; masters that start anywhere in them
show each step in the right share of the weights (stochastic rounding's argument, Gupta et al.,
arXiv 1502.02551, applied once, to the start).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import torch

from engine.errors import CheckpointError
from kernels.finite import peaks
from kernels.torch_compat import copy_together
from recipes.trainers.loss_scale import LossScale

_HALF_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Masters:
    """What the optimizer changes: the model's own parameters in float32, or float32 copies.

    model: its parameters are float32 and become `dtype`; buffers, such as the inverse frequencies
    of rotary embeddings, stay as they are. loss_scale: what the loss is multiplied by; gradients
    are divided by it as they become float32.
    """

    def __init__(
        self, model: torch.nn.Module, dtype: torch.dtype, loss_scale: LossScale | None = None
    ) -> None:
        self._computing = dict(model.named_parameters())
        self._named = self._computing
        if dtype == torch.float32:
            return
        self._named = {
            name: torch.nn.Parameter(parameter.detach().clone())
            for name, parameter in self._computing.items()
        }
        for name, parameter in self._computing.items():
            parameter.data = parameter.detach().to(dtype)
            if parameter.requires_grad:
                hand_over = _hand_over_to(self._named[name], loss_scale)
                parameter.register_post_accumulate_grad_hook(hand_over)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The float32 parameters, in the model's order; gradients gather here."""
        return list(self._named.values())

    def state(self) -> dict[str, torch.Tensor]:
        """The masters by parameter name."""
        return {name: master.detach() for name, master in self._named.items()}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`. Raises KeyError for a parameter that is missing."""
        for name, master in self._named.items():
            master.copy_(state[name])
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters that the model computes with."""
        if self._named is not self._computing:
            copy_together(
                [parameter.detach() for parameter in self._computing.values()],
                [master.detach() for master in self._named.values()],
            )


def _hand_over_to(
    master: torch.nn.Parameter, loss_scale: LossScale | None
) -> Callable[[torch.Tensor], None]:
    """A hook that adds a parameter's gradient, less the scale of its loss, to its master's and
    drops it, so that micro-batches add up in float32."""

    def hand_over(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        share = 1.0 if loss_scale is None else 1.0 / loss_scale.value
        if master.grad is None:
            master.grad = parameter.grad.float()
            if share != 1.0:
                master.grad *= share
        else:
            master.grad.add_(parameter.grad, alpha=share)
        parameter.grad = None

    return hand_over


@torch.no_grad()
def require_range(named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Raise CheckpointError naming a tensor with values that `dtype` cannot hold. named: float32
    tensors of one device. A trainer would compute with inf in their place."""
    names, tensors = zip(*named, strict=True)
    found = peaks(tensors, backend="torch")
    # Conversion is monotone, so that the largest element speaks for all.
    fits = found.to(dtype).isfinite() | ~found.isfinite()
    if not fits.all():
        index = int((~fits).nonzero()[0])
        raise CheckpointError(
            f"{names[index]} has values up to {float(found[index]):g}, which "
            f"{str(dtype).removeprefix('torch.')} cannot hold; train in bfloat16 or float32",
            field=names[index],
        )


@torch.no_grad()
def dither(
    named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, *, seed: int
) -> list[str]:
    """Move float32 tensors that lie on the grid of `dtype`, in place, each element to a uniform
    place inside its rounding cell; returns the names of those moved.

    Afterwards `tensor.to(dtype)` has the same bits as before. Tensors with any element off the
    grid, such as those of a dequantised file, start somewhere in their cells as it is and are left
    alone; but elements below the normal numbers of `dtype` do not count, and stay alone where they
    are off it: so it is with a bfloat16 checkpoint in float16, whose finest numbers are coarser.
    The draw depends on seed and name alone, not on order, device or process.
    """
    moved = []
    for name, tensor in named:
        served = tensor.to(dtype)
        on_grid = served.float() == tensor
        counts = tensor.abs() >= torch.finfo(dtype).smallest_normal
        if bool((on_grid | ~counts).all()) and bool(on_grid.any()):
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            inside = _inside_cells(served.cpu(), generator).to(tensor.device)
            tensor.copy_(torch.where(on_grid, inside, tensor))
            assert torch.equal(tensor.to(dtype), served), f"{name} left its rounding cells"
            moved.append(name)
    return moved


def _inside_cells(grid: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A float32 number that rounds to each element of `grid`, uniform over those that do.

    Zeros, and what is not finite, stay: a zero's cell is nothing that an update could leave.
    """
    centre = grid.float()
    bits = grid.view(_HALF_BITS[grid.dtype])
    # Away from zero and towards it: neighbours in the order of the bits, whatever the sign.
    outer, inner = (bits + 1).view(grid.dtype).float(), (bits - 1).view(grid.dtype).float()
    upper, lower = (outer - centre) / 2, (inner - centre) / 2
    place = torch.rand(grid.shape, generator=generator, dtype=torch.float32)
    moved = centre + lower + (upper - lower) * place
    stays = (centre == 0) | ~torch.isfinite(outer) | (moved.to(grid.dtype) != grid)
    return torch.where(stays, centre, moved)
