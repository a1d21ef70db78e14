"""Profiles over HTTP: where they may be written, and what is refused by which error."""

from pathlib import Path
from typing import Any

import pytest

from engine.protocol import StartProfile, StopProfile
from tests.helpers.http_app import run, serving


def test_slimes_calls_and_their_order(tmp_path: Path) -> None:
    body = {
        "output_dir": str(tmp_path / "traces"),
        "start_step": None,
        "num_steps": 3,
        "activities": ["CPU"],
        "profile_by_stage": False,
        "with_stack": None,
        "record_shapes": True,
    }

    async def test() -> None:
        async with serving(profile_root=str(tmp_path)) as server:
            early = await server.post("/stop_profile")
            assert (early.status_code, early.json()["error"]["type"]) == (400, "ProfileOrder")
            assert (await server.post("/start_profile", body)).status_code == 200
            twice = await server.post("/start_profile", body)
            assert (twice.status_code, twice.json()["error"]["type"]) == (400, "ProfileOrder")
            stopped = (await server.post("/stop_profile")).json()
            assert stopped["success"]
            assert stopped["traces"] == ["/traces/fake-TP-0.trace.json.gz"]
            _, first, _, last = server.commands()
            assert isinstance(first, StartProfile)
            assert first.folder == str(tmp_path / "traces")
            assert (first.activities, first.num_steps, first.start_step) == (["cpu"], 3, None)
            assert (first.with_stack, first.record_shapes) == (False, True)
            assert last == StopProfile()

    run(test)


def test_without_a_folder_it_is_the_root(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(profile_root=str(tmp_path)) as server:
            # vLLM's clients send no body.
            reply = await server.http.post("/start_profile")
            assert reply.json()["output_dir"] == str(tmp_path)

    run(test)


@pytest.mark.parametrize("where", ["/etc", "{root}/../other", "{root}/link/x", "relative"])
def test_a_folder_outside_of_the_root_is_refused(tmp_path: Path, where: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    folder = where.format(root=root)

    async def test() -> None:
        async with serving(profile_root=str(root)) as server:
            for path, body in (
                ("/start_profile", {"output_dir": folder}),
                ("/command", {"type": "start_profile", "folder": folder}),
            ):
                error = (await server.post(path, body)).json()["error"]
                assert error["type"] == "Forbidden"
                assert "--profile-root" in error["message"]
            assert server.commands() == []

    run(test)


@pytest.mark.parametrize(
    "body,kind,field",
    [
        ({"activities": ["MEM"]}, "UnsupportedOption", "activities"),
        ({"profile_by_stage": True}, "UnsupportedOption", "profile_by_stage"),
        ({"merge_profiles": True}, "UnsupportedOption", "merge_profiles"),
        ({"profile_prefix": "../x"}, "InvalidRequest", "profile_prefix"),
        ({"profile_id": ""}, "InvalidRequest", "profile_id"),
        ({"num_steps": 0}, "InvalidRequest", "num_steps"),
        ({"start_step": -1}, "InvalidRequest", "start_step"),
    ],
)
def test_what_is_refused(body: dict[str, Any], kind: str, field: str) -> None:
    async def test() -> None:
        async with serving() as server:
            reply = await server.post("/start_profile", body)
            assert reply.status_code == 400
            assert (reply.json()["error"]["type"], reply.json()["error"]["field"]) == (kind, field)
            assert server.commands() == []

    run(test)
