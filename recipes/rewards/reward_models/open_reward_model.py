"""From --reward model:PATH or classify:URL to the reward that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import httpx

from engine.config import CacheConfig, Device, DType, EngineConfig, ParallelConfig
from engine.errors import InvalidRequest
from recipes.rewards.base import Reward
from recipes.rewards.reward_models.reward_model import RewardModel
from recipes.rewards.reward_models.reward_model_options import RewardModelOptions
from recipes.rewards.reward_models.reward_server import RewardServer
from recipes.rewards.reward_options import CLASSIFY, MODEL, GraderOptions
from recipes.world import World
from rollout.offline import Tokenizer, load_tokenizer

_INFO_S = 30.0


class Graded(Protocol):
    """Options of a run, or of an evaluation, in whose processes a reward model grades."""

    @property
    def device(self) -> Device:
        """Of the policy's engine, and of the reward model's."""

    @property
    def dtype(self) -> DType:
        """As `device`."""

    @property
    def rewards(self) -> GraderOptions:
        """What grades."""

    @property
    def reward_model(self) -> RewardModelOptions:
        """How a reward model is served and read."""


def open_reward_model(spec: str, options: Graded, world: World | None = None) -> Reward:
    """The reward model that `--reward` names, ready to grade for this process.

    Raises InvalidRequest naming the option, and what loading a model raises.
    """
    rank, own = (world or World()).local_rank, options.reward_model
    if spec.startswith(MODEL):
        path = spec.removeprefix(MODEL)
        gpu = rank if own.reward_gpu is None else own.reward_gpu + rank
        config = EngineConfig(
            model=path,
            device=options.device,
            dtype=options.dtype,
            cache=CacheConfig(memory_bytes=int(own.reward_memory_gb * 2**30)),
            parallel=ParallelConfig(base_gpu=gpu),
        )
        return RewardModel(config, load_tokenizer(path), label=own.reward_label)
    url = spec.removeprefix(CLASSIFY)
    folder = own.reward_tokenizer
    tokenizer = load_tokenizer(folder) if folder else served_tokenizer(url)
    timeout_s = options.rewards.reward_timeout
    return RewardServer(url, tokenizer, label=own.reward_label, timeout_s=timeout_s)


def served_tokenizer(url: str, transport: httpx.BaseTransport | None = None) -> Tokenizer:
    """The tokenizer of the classifier that a server serves, from the folder that it names.

    transport: how the server is reached, by default over the network. Raises InvalidRequest
    (`reward`, `reward_tokenizer`) for a server that cannot be asked or serves no classifier, and
    for a folder that is not on this machine.
    """
    info = _model_info(url, transport)
    if info.get("is_generation") is True:
        raise InvalidRequest(
            f"reward: the server at {url} serves a model that generates, not one that scores; "
            "serve a ...ForSequenceClassification checkpoint",
            field="reward",
        )
    path = info.get("tokenizer_path") or info.get("model_path")
    if not isinstance(path, str) or not Path(path).exists():
        raise InvalidRequest(
            f"reward_tokenizer: the server at {url} has its tokenizer in {path!r}, which is not on "
            "this machine; give --reward-tokenizer FOLDER with the chat template of its model",
            field="reward_tokenizer",
        )
    return load_tokenizer(path)


def _model_info(url: str, transport: httpx.BaseTransport | None) -> dict[str, Any]:
    try:
        with httpx.Client(base_url=url, timeout=_INFO_S, transport=transport) as client:
            reply = client.get("/get_model_info").raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise InvalidRequest(
            f"reward: no server that scores answers at {url}: {type(error).__name__}: {error}",
            field="reward",
        ) from error
    return reply if isinstance(reply, dict) else {}
