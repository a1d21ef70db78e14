"""What a worker says of itself by `GET /server_info`, as far as a router goes by it."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from engine.errors import InvalidRequest
from rollout.requests.json_types import convert
from rollout.router.errors import WorkerLies

_Ranks = Annotated[int, Meta(ge=1, le=1 << 16)]


class Facts(Struct, frozen=True, kw_only=True):
    """Fields of SGLang's route, which other servers have in part. num_gpus: ranks of the engine, of
    which tp_size are one copy of the model. internal_states: of its schedulers."""

    served_model_name: str | None = None
    model_path: str | None = None
    weight_version: str | int | None = None
    num_gpus: _Ranks | None = None
    tp_size: _Ranks | None = None
    internal_states: list[Any] | None = None

    @property
    def model(self) -> str:
        """The name of the model that is served; "" where it has none."""
        return self.served_model_name or self.model_path or ""

    @property
    def version(self) -> str:
        """The label of the weights; "" where it has none."""
        return "" if self.weight_version is None else str(self.weight_version)

    @property
    def num_ranks(self) -> int:
        """Ranks of the engine."""
        return self.num_gpus or self.tp_size or 1

    @property
    def refusal(self) -> str:
        """Why the engine refuses to generate; "" where it does not."""
        first = self.internal_states[0] if self.internal_states else None
        return str(first.get("refusal") or "") if isinstance(first, dict) else ""


def facts_of(url: str, told: dict[str, Any]) -> Facts:
    """The facts of the worker at `url`. Raises WorkerLies, by the name of the field that no server
    can have."""
    try:
        found: Facts = convert(told, Facts)
    except InvalidRequest as error:
        raise WorkerLies(
            f"{url} says of itself what cannot be: {error.message}", field=error.field
        ) from error
    return found
