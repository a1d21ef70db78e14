"""The rows that a verifying step runs. V of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class VirtualRows:
    """Rows that decode one token each; those of a sequence are adjacent.

    slots_V: int32, the slot whose pages a row attends to. kv_lens_V: int32, tokens that it
    attends to, its own among them. positions_V: int64, index of its token in the sequence.
    input_ids_V: int64, that token. write_slots_V: int64, where its keys and values go, as
    `kernels.kv_copy.write_kv` takes it. valid_V: bool; a row that is not valid decodes token 0 at
    position 0 of the scratch slot.
    """

    slots_V: torch.Tensor
    kv_lens_V: torch.Tensor
    positions_V: torch.Tensor
    input_ids_V: torch.Tensor
    write_slots_V: torch.Tensor
    valid_V: torch.Tensor

    def first(self, num_rows: int) -> VirtualRows:
        """The first rows of these buffers."""
        return VirtualRows(
            slots_V=self.slots_V[:num_rows],
            kv_lens_V=self.kv_lens_V[:num_rows],
            positions_V=self.positions_V[:num_rows],
            input_ids_V=self.input_ids_V[:num_rows],
            write_slots_V=self.write_slots_V[:num_rows],
            valid_V=self.valid_V[:num_rows],
        )

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> VirtualRows:
        """Buffers of `num_rows` rows, whose values say nothing yet."""

        def buffer(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(num_rows, dtype=dtype, device=device)

        return cls(
            slots_V=buffer(torch.int32),
            kv_lens_V=buffer(torch.int32),
            positions_V=buffer(torch.int64),
            input_ids_V=buffer(torch.int64),
            write_slots_V=buffer(torch.int64),
            valid_V=buffer(torch.bool),
        )
