"""An engine whose weights are unfinished, as clients of each dialect see it: a typed 503."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import NoVersion
from engine.protocol import Command, CommitUpdate, Reply, StepPlan, StepResult
from tests.helpers.fake_executor import FakeExecutor, FakePending, expected_tokens
from tests.helpers.http_app import run, serving

WHY = "the update to version 1 is written in place and not committed; publish a whole version"
TWO = {"max_new_tokens": 2}


class Unfinished(FakeExecutor):
    """Refuses steps until the next commit, as ranks do after an update that failed in place."""

    torn = True

    def execute(self, plan: StepPlan) -> StepResult:
        if self.torn:
            raise NoVersion(WHY, field="version")
        return super().execute(plan)

    def launch(self, plan: StepPlan) -> FakePending:
        return FakePending(self.execute(plan))

    def handle(self, command: Command) -> Reply:
        self.torn = self.torn and not isinstance(command, CommitUpdate)
        return super().handle(command)


@pytest.mark.parametrize(
    "path,body",
    [
        ("/generate", {"input_ids": [5], "sampling_params": TWO}),
        ("/generate", {"input_ids": [[5], [6]], "sampling_params": {**TWO, "n": 2}}),
        ("/v1/completions", {"prompt": [5], "max_tokens": 2}),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"max_tokens": 2}}),
    ],
)
def test_every_request_is_a_503_until_a_whole_version_is_there(
    path: str, body: dict[str, Any]
) -> None:
    async def test() -> None:
        async with serving(executor=Unfinished) as server:
            for _ in range(2):
                reply = await server.post(path, body)
                assert reply.status_code == 503, reply.text
                error = reply.json()["error"]
                assert (error["type"], error["message"]) == ("NoVersion", WHY)
                # Known from now on without another step.
                server.link.leader._executor.torn = False
            for command in (
                {"type": "begin_update", "version": 1},
                {"type": "load_from_disk", "path": "0"},
                {"type": "commit_update", "version": 1},
            ):
                assert (await server.post("/command", command)).status_code == 200
            good = await server.post("/generate", {"input_ids": [5], "sampling_params": TWO})
            assert good.json()["output_ids"] == expected_tokens([5], 2)

    run(test)


def test_a_stream_that_has_begun_ends_by_the_error() -> None:
    async def test() -> None:
        async with serving(executor=Unfinished) as server:
            body = {"input_ids": [5], "sampling_params": TWO, "stream": True}
            assert '"NoVersion"' in (await server.post("/generate", body)).text

    run(test)
