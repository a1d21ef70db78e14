"""Servers on a Ray cluster: an actor each, in a placement group of its own, which runs one process.

Ray places and starts them, and says when one is gone; no tensor goes through it, and it restarts
nothing: a server that is gone is placed anew, registers with the router, and waits there until the
trainer publishes to it. Imported only by runs with `--launch ray`.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from recipes.actors.serve_command import Command
from rollout.replica.python_child import child_command, child_environment

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
# The index of a GPU differs between a node and what one of its processes sees; its UUID does not.
_UNTOUCHED = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def node_address() -> str:
    """This machine's address in the cluster that this process is connected to, or now connects to
    as `ray.init` does."""
    if not ray.is_initialized():
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
    return str(ray.util.get_node_ip_address())


class Server:
    """In an actor of Ray: runs one server, which ends with it."""

    def run(self, command: Command) -> int:
        """Run it to its end; the exit code."""
        words = command(ray.util.get_node_ip_address())
        uuids = _uuids(ray.get_gpu_ids())
        environment = child_environment()
        if uuids:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(uuids)
        guard = child_command("recipes.actors.guard_main", *words)
        with subprocess.Popen(guard, stdin=subprocess.PIPE, env=environment) as process:
            return process.wait()


@dataclass
class _Place:
    """Where one server is. ended: what comes once it is gone."""

    group: Any
    actor: Any
    ended: Any


class RayFleet:
    """`count` servers, kept at that number.

    command: of each. num_gpus: of each, all on one node; without any it takes `num_cpus` in their
    place.
    """

    def __init__(
        self, command: Command, *, count: int, num_gpus: int = 0, num_cpus: int = 1
    ) -> None:
        self._command = command
        self._num_gpus = num_gpus
        self._num_cpus = 0 if num_gpus else num_cpus
        self._closing = threading.Event()
        self._places = [self._start() for _ in range(count)]
        self.num_restarts = 0
        self._watch = threading.Thread(target=self._keep, name="ray-fleet", daemon=True)
        self._watch.start()

    def close(self) -> None:
        """End the servers and give back their places. Idempotent."""
        self._closing.set()
        self._watch.join()
        while self._places:
            self._drop(self._places.pop())

    def _keep(self) -> None:
        while not self._closing.wait(_LOOK_S):
            for index, place in enumerate(self._places):
                ready, _ = ray.wait([place.ended], timeout=0)
                if ready:
                    logger.warning("server %d is placed anew: %s", index, _why(place.ended))
                    self._drop(place)
                    self._places[index] = self._start()
                    self.num_restarts += 1

    def _start(self) -> _Place:
        """Ask for a place; a server is started once there is one."""
        resources = {"GPU": self._num_gpus} if self._num_gpus else {"CPU": self._num_cpus}
        group = placement_group([resources], strategy="STRICT_PACK")
        # Of the actor too: a bundle alone gives it no GPU (ray-project/ray, issue 50180).
        options: dict[str, Any] = {
            "num_gpus": self._num_gpus,
            "num_cpus": self._num_cpus,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
            "runtime_env": {"env_vars": _UNTOUCHED},
        }
        actor = ray.remote(Server).options(**options).remote()
        return _Place(group, actor, actor.run.remote(self._command))

    def _drop(self, place: _Place) -> None:
        ray.kill(place.actor)
        remove_placement_group(place.group)


def _why(ended: Any) -> str:
    """What became of a server that is gone."""
    try:
        return f"it left with exit code {ray.get(ended)}"
    except ray.exceptions.RayError as error:
        return str(error).splitlines()[0]


def _uuids(ids: Sequence[Any]) -> list[str]:
    """The UUIDs of GPUs of this node by their indices; none of none."""
    if not ids:
        return []
    asked = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")
    return [found[int(index)].strip() for index in ids]
