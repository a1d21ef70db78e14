"""Which stream the engines of a run are fed by."""

from __future__ import annotations

from engine.errors import UnsupportedOption
from recipes.actors.actor import InlineActor
from recipes.actors.fleet import FleetActor
from recipes.actors.launch import needs_first_push
from recipes.asynchrony.fleet_stream import FleetStream
from recipes.asynchrony.inline_stream import InlineStream
from recipes.asynchrony.reply_stream import ReplyStream
from recipes.run.run import Run


def open_stream(run: Run) -> tuple[ReplyStream, bool]:
    """The stream to the engines of the run's actor, and whether replies are graded beside the loop.
    Raises UnsupportedOption (`async`) for engines that cannot be fed while they run."""
    if run.world.size > 1:
        raise UnsupportedOption(
            "async: several processes that train would wait for each other's replies; start one, "
            "or leave --async out",
            field="async",
        )
    given = run.options.asynchrony
    if isinstance(run.actor, FleetActor) and needs_first_push(run.options):
        raise UnsupportedOption(
            "async: the engines of --endpoint and --launch ray are not fed while the trainer "
            "computes yet; leave --async out",
            field="async",
        )
    if isinstance(run.actor, FleetActor):
        return FleetStream(run.actor), given.max_staleness > 0
    if isinstance(run.actor, InlineActor):
        steps = given.engine_steps
        steps = max(1, run.max_new_tokens // 2) if steps is None else steps
        return InlineStream(run.actor.replica, steps_per_update=steps), False
    raise UnsupportedOption(
        f"async: {type(run.actor).__name__} is not fed while it runs; leave --async out",
        field="async",
    )
